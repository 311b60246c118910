// Low-bit weights on a CPU (equation, formats and bytes: fusedadapt/reference/quant.py). Tables of codes and cuts are handed in; none is written here.
//
// A weight is N rows of K codes. Flat formats, whose groups run on from row to row, are one row of N * K elements to the codec. Offsets are 64 bits wide.
#pragma once
#include <cstdint>

namespace fa::cpu::quant {

// Groups: tiles of rows x columns, `wide` of them side by side.
struct Grid {
  int64_t rows = 1, columns = 1, wide = 1;
};

enum class Coding : int32_t { kPlain, kPowers, kTable };  // fp32, fp16 or bf16; E8M0; table[byte] * above[g / block] (+ offset)

struct Scales {
  const void* data = nullptr;
  Coding coding = Coding::kPlain;
  int32_t dtype = 0;  // kPlain
  const float* table = nullptr;
  const float* above = nullptr;
  const float* offset = nullptr;  // may be absent
  int64_t block = 1;
};

// kUnsigned, kSigned: the code as an integer, plus values[0] if unsigned. kE4M3, kE5M2: the byte as a float.
enum class Values : int32_t { kTable, kUnsigned, kSigned, kE4M3, kE5M2 };

struct Weight {
  const uint8_t* codes = nullptr;
  int64_t n = 0, k = 0, row_bytes = 0;
  Grid grid;
  Scales scales;
  const void* zero = nullptr;  // one per group, of zero_dtype: kU8, kF32; kNone: absent
  const float* values = nullptr;  // 2^bits
  int32_t zero_dtype = 0, bits = 8;
  Values kind = Values::kTable;
  bool flat = false;  // then the first of two 4-bit codes is the high one
  bool decoded = false;  // products multiply numbers, never sums of codes, whatever the layout would allow
};

struct Statistics {
  const void* w = nullptr;  // contiguous
  int64_t n = 0, k = 0;
  int32_t dtype = 0;
  Grid grid;
};

// Where the search among many cuts begins: numbers alike in sign, exponent and 6 bits of the mantissa begin together.
struct CutIndex {
  static constexpr int32_t kShift = 17, kFirst = (127 - 23) << 6,
                           kSize = 24 << 6;  // of magnitudes from 2^-23 to 2, the ends take what lies beyond
  float start[2 * kSize];  // cuts below the least number of a bucket, an integer's bits; negative numbers in the second half
  int32_t steps = 0;  // cuts in a bucket at most
};

struct Encoding {
  const void* w = nullptr;  // contiguous
  int64_t n = 0, k = 0, row_bytes = 0;
  int32_t dtype = 0, bits = 8;
  Grid grid;
  const float* factor = nullptr;
  const float* zero = nullptr;
  bool divide = false, round_last = false;  // round_last: the zero is added before rounding
  bool flat = false, magnitude = false, sign_bit = false;
  int32_t low = 0, high = 0, bias = 0;
  int32_t cut_count = 0;  // 0: integers
  const float* cuts = nullptr;
  const uint8_t* order = nullptr;  // the code for every count of cuts
  Values kind = Values::kTable;  // kE4M3, kE5M2: the cuts are those of rounding to nearest even
  const CutIndex* index = nullptr;  // of more than 15 cuts; `encode` makes it
  int32_t pad = 0;  // what a started byte is filled up with
  uint8_t* out = nullptr;
};

constexpr int64_t kPiece = 1024;  // columns that the codec takes at a time

struct CodecKernels {
  // Least and largest of tiles [tile0, tile1) over the rows [row0, row1), all in one row of tiles.
  void (*stats)(const Statistics&, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1, float* lo, float* hi);
  // At most kPiece columns; c0 a multiple of 8.
  void (*encode)(const Encoding&, int64_t row, int64_t c0, int64_t c1);
  void (*decode)(const Weight&, int64_t row, int64_t c0, int64_t c1, int dtype, void* out);
};
extern const CodecKernels codec_base;
#if defined(__x86_64__)
extern const CodecKernels codec_avx2, codec_avx512;
#endif

// y = x W^T + bias (x: T x K), or x = dY (T x N) and y = dY W. Rows of x are `stride` elements apart; y is contiguous, in x's dtype.
struct Product {
  const void* x = nullptr;
  int64_t t = 0, stride = 0;
  int32_t dtype = 0;
  const float* bias = nullptr;
  void* y = nullptr;
};

// Rows of x as fp32, in the order in which a kernel meets the codes, zeros up to whole units; their sums over every unit, a vector each; and what
// rows of huge numbers were multiplied by, so that sums of codes, which may be far larger than the weight, stay finite.
struct Operand {
  float* x = nullptr;
  float* sums = nullptr;
  float* factor = nullptr;
  int64_t stride = 0, sums_stride = 0;
  bool pairs = false;  // x stays in bf16, in the order of the kernel's pairs of codes
};

constexpr int64_t kMostRows = 16;  // of x at a time

struct ProductKernels {
  const char* name;
  // Floats of one row of an operand, and of its sums.
  void (*size)(const Weight&, int64_t* row, int64_t* sums);
  // 1, or a power of two that brings row t of x, of so many columns, into the range in which nothing overflows; 0: the row has an infinity
  float (*factor)(const Product&, int64_t t, int64_t columns);
  bool (*pairs_fit)(const Weight&, const Product&);
  void (*arrange)(const Weight&, const Product&, int64_t t, const Operand&);
  // Columns [n0, n1) of y.
  void (*linear)(const Weight&, const Product&, const Operand&, int64_t n0, int64_t n1);
  // sums = dY[:, n0:n1] W[n0:n1], in the order of an operand
  void (*linear_dx)(const Weight&, const Product&, int64_t n0, int64_t n1, const Operand& sums);
  // Row t of y from the sums of `count` slots, `step` floats apart, which are added in order.
  void (*finish_dx)(const Weight&, const Product&, int64_t t, const Operand& sums, int64_t step, int64_t count);
};
extern const ProductKernels product_base;
#if defined(__x86_64__)
extern const ProductKernels product_avx2, product_avx512;
#endif

const CodecKernels& codec();  // what cpu::use_isa chose
const ProductKernels& products();

// The functions of the reference.
void stats(const Statistics&, float* lo, float* hi, int threads);
void encode(const Encoding&, int threads);
void dequantize(const Weight&, int64_t row0, int64_t row1, int dtype, void* out, int threads);
void linear(const Weight&, const Product&, int threads);
void linear_dx(const Weight&, const Product&, int threads);

}  // namespace fa::cpu::quant
