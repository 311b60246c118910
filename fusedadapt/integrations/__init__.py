"""Bridges to other libraries. Nothing here is imported until it is needed."""
