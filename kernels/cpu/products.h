// Products with weights that stay as they are: y[t][o] = sum over k of x[t][k] w[o][k].
//
// A weight lies in panels of NR outputs, inputs one after the other (weights.py): panel[k][o]. A pass of few tokens is a
// matter of reading each weight once, and so it is read in one direction, every byte once for up to MOST_ROWS rows; of
// many rows MOST_ROWS x NR sums stay in registers. A sum is taken input after input, in float32, so a row's bits depend on
// nothing but the row. bfloat16 lies in pairs of inputs, panel[k / 2][o][2], as the units for it want it.

#include "vectors.h"

#if W == 16
#define MOST_ROWS 12
#else
#define MOST_ROWS 6
#endif
// Rows whose results are finished together: two tiles of AMX.
#define BLOCK_ROWS 32

#if defined(__AVX512BF16__) && W == 16
#define PAIRS_IN_BF16 1  // products of bfloat16 take bfloat16 on both sides
#else
#define PAIRS_IN_BF16 0
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && PAIRS_IN_BF16 && defined(__linux__)
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AMX 0
#endif

// Also in weights.py.
typedef struct {
    const void* data;
    const float* scale;  // of each output, padded as panels are; or NULL
    int64_t kind, outputs, inputs, panels;  // panels of one expert
} Weight;

// The inputs are padded where units take 32 of them.
INLINE long padded_inputs(const Weight* w) { return w->kind == BF16 ? padded(w->inputs, 32) : w->inputs; }
INLINE int input_kind(const Weight* w) { return w->kind == BF16 && PAIRS_IN_BF16 ? BF16 : F32; }
INLINE long panel_bytes(const Weight* w) { return padded_inputs(w) * NR * SIZE[w->kind]; }
// Bytes of a row of inputs, as products read them and as whole vectors are written.
INLINE long row_bytes(const Weight* w) { return padded(w->inputs, 32) * SIZE[input_kind(w)]; }

// ------------------------------------------------------------------------------------------- sums that stay in registers

INLINE vf as_floats(int kind, const char* p) {
    if (kind == F32) return load((const float*)p);
#if W == 16
    if (kind == F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void*)p));
    if (kind == I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void*)p)));
#elif W == 8
    if (kind == I8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void*)p)));
#if defined(__F16C__)
    if (kind == F16) return _mm256_cvtph_ps(_mm_loadu_si128((const void*)p));
#endif
#endif
    vf x;
    for (int i = 0; i < W; i++) x[i] = kind == I8 ? (float)((const int8_t*)p)[i] : (float)((const _Float16*)p)[i];
    return x;
}

#define ROWS_1(X) X(0)
#define ROWS_2(X) ROWS_1(X) X(1)
#define ROWS_3(X) ROWS_2(X) X(2)
#define ROWS_4(X) ROWS_3(X) X(3)
#define ROWS_5(X) ROWS_4(X) X(4)
#define ROWS_6(X) ROWS_5(X) X(5)
#define ROWS_7(X) ROWS_6(X) X(6)
#define ROWS_8(X) ROWS_7(X) X(7)
#define ROWS_9(X) ROWS_8(X) X(8)
#define ROWS_10(X) ROWS_9(X) X(9)
#define ROWS_11(X) ROWS_10(X) X(10)
#define ROWS_12(X) ROWS_11(X) X(11)

#define BEGIN_2(i) vf s##i = {}, t##i = {}; const A* a##i = a + i * a_row;
#define BEGIN_1(i) vf s##i = {}; const A* a##i = a + i * a_row;
#define ADD_2(i) s##i += a##i[at] * v; t##i += a##i[at] * w;
#define ADD_1(i) s##i += a##i[at] * v;
#define PAIR_2(i) s##i += a##i[at] * v; t##i += a##i[at] * w; s##i += a##i[at + 1] * v_odd; t##i += a##i[at + 1] * w_odd;
#define DOT(i) { vi x = a##i[at] - (vi){}; \
    s##i = (vf)_mm512_dpbf16_ps((__m512)s##i, (__m512bh)x, (__m512bh)v); \
    t##i = (vf)_mm512_dpbf16_ps((__m512)t##i, (__m512bh)x, (__m512bh)w); }
#define END_2(i) store(c + i * c_row, s##i); store(c + i * c_row + W, t##i);
#define END_1(i) store(c + i * c_row, s##i);
#define MORE_2(i) store(c + i * c_row, load(c + i * c_row) + s##i); \
    store(c + i * c_row + W, load(c + i * c_row + W) + t##i);

// c[i] (+)= sum over k < n of a[i * a_row + k * a_step] * b[k], b in steps of b_step bytes, two vectors wide or one.
#define SUMS(M, NAME, TYPE, BEGIN, READ, ADD, END) \
    static void NAME##_##M(const TYPE* a, long a_row, long a_step, const char* b, long b_step, long n, float* c, \
                           long c_row) { \
        typedef TYPE A; \
        ROWS_##M(BEGIN) \
        for (long k = 0, at = 0; k < n; k++, at += a_step, b += b_step) { READ ROWS_##M(ADD) } \
        ROWS_##M(END) \
    }
#if W == 16
#define FOR_ROWS(X, ...) X(1, __VA_ARGS__) X(2, __VA_ARGS__) X(3, __VA_ARGS__) X(4, __VA_ARGS__) X(5, __VA_ARGS__) \
    X(6, __VA_ARGS__) X(7, __VA_ARGS__) X(8, __VA_ARGS__) X(9, __VA_ARGS__) X(10, __VA_ARGS__) X(11, __VA_ARGS__) \
    X(12, __VA_ARGS__)
#define TABLE(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6, NAME##_7, NAME##_8, NAME##_9, \
    NAME##_10, NAME##_11, NAME##_12}
#else
#define FOR_ROWS(X, ...) X(1, __VA_ARGS__) X(2, __VA_ARGS__) X(3, __VA_ARGS__) X(4, __VA_ARGS__) X(5, __VA_ARGS__) \
    X(6, __VA_ARGS__)
#define TABLE(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6}
#endif

#define READ_2(KIND) const vf v = as_floats(KIND, b); const vf w = as_floats(KIND, b + W * SIZE[KIND]);
#define READ_1 const vf v = load((const float*)b);
// In a word of a pair the lower half is the even input.
#define READ_PAIRS const vi both_v = *(const vi_at*)b; const vi both_w = *(const vi_at*)(b + 4 * W); \
    const vf v = (vf)(both_v << 16); const vf v_odd = (vf)(both_v & (int32_t)0xffff0000); \
    const vf w = (vf)(both_w << 16); const vf w_odd = (vf)(both_w & (int32_t)0xffff0000);
#define READ_WORDS const vi v = *(const vi_at*)b; const vi w = *(const vi_at*)(b + 4 * W);

FOR_ROWS(SUMS, f32, float, BEGIN_2, READ_2(F32), ADD_2, END_2)
FOR_ROWS(SUMS, f16, float, BEGIN_2, READ_2(F16), ADD_2, END_2)
FOR_ROWS(SUMS, i8, float, BEGIN_2, READ_2(I8), ADD_2, END_2)
FOR_ROWS(SUMS, narrow, float, BEGIN_1, READ_1, ADD_1, END_1)  // one vector wide: scores of attention
FOR_ROWS(SUMS, more, float, BEGIN_2, READ_2(F32), ADD_2, MORE_2)  // added to what is there: values of attention
#if PAIRS_IN_BF16
FOR_ROWS(SUMS, bf16, int32_t, BEGIN_2, READ_WORDS, DOT, END_2)
#else
FOR_ROWS(SUMS, bf16, float, BEGIN_2, READ_PAIRS, PAIR_2, END_2)
#endif

typedef void Sums(const float*, long, long, const char*, long, long, float*, long);
static Sums* const f32_sums[] = TABLE(f32);
static Sums* const f16_sums[] = TABLE(f16);
static Sums* const i8_sums[] = TABLE(i8);
static Sums* const narrow_sums[] = TABLE(narrow);
static Sums* const more_sums[] = TABLE(more);
#if PAIRS_IN_BF16
typedef void PairSums(const int32_t*, long, long, const char*, long, long, float*, long);
static PairSums* const bf16_sums[] = TABLE(bf16);
#else
static Sums* const bf16_sums[] = TABLE(bf16);
#endif

// ------------------------------------------------------------------------------------------------------ tiles of AMX

#if AMX
static int amx_is_on;

// Linux wants to be asked by the process (arch_prctl, XTILEDATA = 18), and every thread says the shapes of its tiles.
__attribute__((constructor)) static void ask_for_amx(void) { amx_is_on = !syscall(SYS_arch_prctl, 0x1023, 18); }

static void tiles_on(void) {
    static const struct __attribute__((packed)) {
        uint8_t palette, start_row, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    if (amx_is_on) _tile_loadconfig(&shapes);
}
static void tiles_off(void) { if (amx_is_on) _tile_release(); }

// c[32][32] of 32 rows of inputs, or of the first 16: rows that nobody asked for are multiplied as well.
static void amx_sums(int many, const char* a, long a_row, const char* b, long inputs, float* c) {
    _tile_zero(0); _tile_zero(1);
    if (many) {
        _tile_zero(2); _tile_zero(3);
        for (long k = 0; k < inputs; k += 32, a += 64, b += 16 * 128) {
            _tile_loadd(4, a, a_row); _tile_loadd(5, a + 16 * a_row, a_row);
            _tile_loadd(6, b, 128); _tile_loadd(7, b + 64, 128);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, c + 16 * 32, 128); _tile_stored(3, c + 16 * 32 + 16, 128);
    } else {
        for (long k = 0; k < inputs; k += 32, a += 64, b += 16 * 128) {
            _tile_loadd(4, a, a_row); _tile_loadd(6, b, 128); _tile_loadd(7, b + 64, 128);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
}
#else
static void tiles_on(void) {}
static void tiles_off(void) {}
#endif

// ------------------------------------------------------------------------------------------------------- whole products

// One panel times up to BLOCK_ROWS rows of inputs, `row` bytes apart -> c[rows][NR]; the scale is left out.
static void panel_sums(const Weight* w, const char* panel, const char* in, long row, long rows, float* c) {
#if AMX
    if (w->kind == BF16 && amx_is_on) {
        amx_sums(rows > 16, in, row, panel, padded_inputs(w), c);
        return;
    }
#endif
    for (long done = 0, tiles = parts(rows, MOST_ROWS); tiles; tiles--) {
        long m = parts(rows - done, tiles);
        const char* a = in + done * row;
        float* to = c + done * NR;
        if (w->kind == F32) f32_sums[m - 1]((const float*)a, row / 4, 1, panel, 4 * NR, w->inputs, to, NR);
        if (w->kind == F16) f16_sums[m - 1]((const float*)a, row / 4, 1, panel, 2 * NR, w->inputs, to, NR);
        if (w->kind == I8) i8_sums[m - 1]((const float*)a, row / 4, 1, panel, NR, w->inputs, to, NR);
        if (w->kind == BF16) {
            long pairs = padded_inputs(w) / 2;
            bf16_sums[m - 1]((const void*)a, row / 4, PAIRS_IN_BF16 ? 1 : 2, panel, 4 * NR, pairs, to, NR);
        }
        done += m;
    }
}

// What is done with the sums.
enum { PUT, ADD, SWIGLU, GELU };
typedef struct {
    int what;
    float* out;  // PUT, ADD
    long out_row, width;  // in floats; outputs that there are
    char* activated;  // SWIGLU, GELU: inputs of the next product, of `activated_kind`, rows of `activated_row` bytes
    int activated_kind;
    long activated_row;
} Finish;

static void finish(const Finish* f, const float* scale, long panel, long row, long rows, const float* c) {
    const vf one = splat(1.0f), scale_0 = scale ? load(scale + panel * NR) : one;
    const vf scale_1 = scale ? load(scale + panel * NR + W) : one;
    for (long i = 0; i < rows; i++, c += NR) {
        const vf x = load(c) * scale_0, y = load(c + W) * scale_1;
        if (f->what <= ADD) {
            float both[NR], *to = f->out + (row + i) * f->out_row + panel * NR;
            store(both, x);
            store(both + W, y);
            long n = at_most(NR, f->width - panel * NR);
            if (f->what == PUT) memcpy(to, both, 4 * n);
            else for (long o = 0; o < n; o++) to[o] += both[o];
            continue;
        }
        // A panel of a gated layer has W gates and their W partners.
        float act[NR];
        long n = f->what == SWIGLU ? W : NR;
        if (f->what == SWIGLU) store(act, silu(x) * y);
        else store(act, gelu(x)), store(act + W, gelu(y));
        char* to = f->activated + (row + i) * f->activated_row + panel * n * SIZE[f->activated_kind];
        from_floats(f->activated_kind, act, to, n);
    }
}

// Panels [first, last) of expert `e` times `rows` rows from `row` on: of as many rows as stay in the cache.
static void multiply(const Weight* w, long e, long first, long last, const char* in, long row, long rows, const Finish* f) {
    float c[BLOCK_ROWS * NR] __attribute__((aligned(64)));
    long bytes = row_bytes(w), size = panel_bytes(w);
    const float* scale = w->scale ? w->scale + e * w->panels * NR : NULL;
    for (long p = first; p < last; p++) {
        const char* panel = (const char*)w->data + (e * w->panels + p) * size;
        for (long done = 0; done < rows; done += BLOCK_ROWS) {
            long m = at_most(BLOCK_ROWS, rows - done);
            panel_sums(w, panel, in + (row + done) * bytes, bytes, m, c);
            finish(f, scale, p, row + done, m, c);
        }
    }
}

// Rows whose inputs stay in the second cache while all panels go by.
INLINE long cached_rows(const Weight* w) { return at_least(BLOCK_ROWS, (256 << 10) / row_bytes(w) / BLOCK_ROWS * BLOCK_ROWS); }
