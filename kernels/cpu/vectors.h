// Numbers as a processor computes with them: vectors of W floats, and what every dtype is read from and written to.
//
// GCC's vector types stand for SSE, AVX2, AVX-512 and NEON alike; intrinsics only where a type has no operation for what
// the processor can do. A function here gives an element the same bits wherever in a vector it stands.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define W 16
#elif defined(__AVX2__) && defined(__FMA__)
#define W 8
#else
#define W 4
#endif
// Outputs of a panel of a weight (products.h).
#define NR (2 * W)

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_at __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_at __attribute__((vector_size(4 * W), aligned(4), may_alias));

// Also in weights.py.
enum { F32, BF16, F16, I8, E4M3 };

static const int SIZE[] = {4, 2, 2, 1, 1};

INLINE vf load(const float* p) { return *(const vf_at*)p; }
INLINE void store(float* p, vf x) { *(vf_at*)p = x; }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf where(vi yes, vf a, vf b) { return (vf)((yes & (vi)a) | (~yes & (vi)b)); }
INLINE vf larger(vf a, vf b) { return where(a > b, a, b); }
INLINE long at_most(long a, long b) { return a < b ? a : b; }
INLINE long at_least(long a, long b) { return a > b ? a : b; }
INLINE long parts(long n, long size) { return (n + size - 1) / size; }
INLINE long padded(long n, long to) { return parts(n, to) * to; }

// ------------------------------------------------------------------------------------------------------- exponentials

// e^x to 2 units of the last place; 0 below -87, and exactly 1 at 0. NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial for e^r, and n added to the exponent.
INLINE vf exp_of(vf x) {
    vi tiny = x < splat(-87.0f);
    x = where(tiny, splat(-87.0f), x);
    x = where(x > splat(88.0f), splat(88.0f), x);
    vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what follows the point is rounded off
    vi n = (vi)shifted - 0x4b400000;
    vf whole = shifted - 12582912.0f;
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return where(tiny, (vf){}, p * (vf)((n + 127) << 23));
}

INLINE vf silu(vf x) { return x / (1.0f + exp_of(-x)); }

// The tanh form: x/2 (1 + tanh u) = x / (1 + e^-2u).
INLINE vf gelu(vf x) {
    vf u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_of(-2.0f * u));
}

// --------------------------------------------------------------------------------------------------------- conversions

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
}

// e4m3: a sign, four bits of exponent (bias 7), three of significand; no infinity, 0x7f is NaN.
static float e4m3_numbers[256];

__attribute__((constructor)) static void fill_e4m3(void) {
    for (int i = 0; i < 256; i++) {
        int exponent = (i >> 3) & 15, significand = i & 7;
        float x = exponent ? ldexpf(8 + significand, exponent - 10) : ldexpf(significand, -9);
        if ((i & 0x7f) == 0x7f) x = NAN;
        e4m3_numbers[i] = i & 0x80 ? -x : x;
    }
}

// To nearest, ties to even; |x| is at most 448.
static uint8_t float_to_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint8_t sign = (bits >> 24) & 0x80;
    float size = fabsf(x);
    if (size != size) return sign | 0x7f;
    if (size < 0.015625f) return sign | (uint8_t)nearbyintf(size * 512.0f);  // a multiple of 2^-9; 8 of them are 2^-6
    memcpy(&bits, &size, 4);
    bits += 0x7ffff + ((bits >> 20) & 1);
    return sign | (uint8_t)((bits >> 20) - ((127 - 7) << 3));
}

static void to_floats(int kind, const void* from, float* to, long n, float scale) {
    if (kind == F32) memcpy(to, from, 4 * n);
    if (kind == BF16) for (long i = 0; i < n; i++) to[i] = bf16_to_float(((const uint16_t*)from)[i]);
    if (kind == F16) for (long i = 0; i < n; i++) to[i] = ((const _Float16*)from)[i];
    if (kind == I8) for (long i = 0; i < n; i++) to[i] = ((const int8_t*)from)[i] * scale;
    if (kind == E4M3) for (long i = 0; i < n; i++) to[i] = e4m3_numbers[((const uint8_t*)from)[i]] * scale;
}

static void from_floats(int kind, const float* from, void* to, long n) {
    if (kind == F32) memcpy(to, from, 4 * n);
    if (kind == BF16) for (long i = 0; i < n; i++) ((uint16_t*)to)[i] = float_to_bf16(from[i]);
    if (kind == F16) for (long i = 0; i < n; i++) ((_Float16*)to)[i] = (_Float16)from[i];
}

// As kernels/quantization.py: returns the scale, the largest magnitude over that of the format.
static float quantize(int kind, const float* from, void* to, long n) {
    float largest = kind == I8 ? 127.0f : 448.0f, amax = 0;
    for (long i = 0; i < n; i++) {
        float size = fabsf(from[i]);
        amax = size > amax || size != size ? size : amax;
    }
    float scale = amax / largest;
    if (scale == scale && !(scale >= 1.17549435e-38f)) scale = 1;
    for (long i = 0; i < n; i++) {
        float x = from[i] / scale;
        x = x > largest ? largest : x < -largest ? -largest : x;
        if (kind == I8) ((int8_t*)to)[i] = x == x ? (int8_t)nearbyintf(x) : 0;
        else ((uint8_t*)to)[i] = float_to_e4m3(x);
    }
    return scale;
}
