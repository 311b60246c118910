"""The main job: a real pretrained encoder, real data, our optimizers. ``python -m fusedadapt finetune --help``; docs/finetune.md."""
