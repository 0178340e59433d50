// One pass of a decoder over a flat batch of tokens, on all threads at once.
//
// A pass is a list of phases, each a component's work, with a barrier behind: embed; of each layer norm, projections,
// attention, projections, norm, router, permute, up, down, combine; at last the head. They run in one parallel region, as
// starting threads takes longer than a phase of one token; whoever measures has them run one at a time (moe/serve/cpu.py).
//
// Shape suffixes: T tokens, D model width, H query and N key/value heads, C head width, E experts, K experts of a token,
// R = T*K routed rows, F expert hidden width, V vocabulary.

#include "attention.h"
#include <omp.h>

// Also in weights.py, field by field.
typedef struct {
    const float *attention_norm_D, *mlp_norm_D, *bias_E;  // bias_E or NULL
    Weight qkv, wo, router, up, down;
    int64_t experts, chosen;  // E, K; 1 and 0 of a plain MLP, which all rows take
    int64_t activation;  // SWIGLU, GELU
} Layer;

typedef struct {
    const Layer* layers;
    int64_t n_layers, d_model, heads, kv_heads, width, vocabulary;
    const void* embedding_VD;
    int64_t embedding_kind;
    const float* norm_D;
    Weight head;
    const float *cos, *sin;  // [positions][C]
    double eps;
    const Cache* caches;  // of each layer
    int64_t cache_kind, block_size;
} Model;

typedef struct {
    int64_t tokens, segments, wanted, threads;
    const int64_t* ids_T;
    const Segment* segments_Q;
    const int32_t* blocks;
    const int64_t* wanted_N;
    float* logits_NV;
    int64_t* chosen_LTK;  // or NULL, and the weights too
    float* weights_LTK;
    char* memory;
} Pass;

// A run of rows of one expert, or of all rows where there are none.
typedef struct { int64_t expert, row, rows; } Run;

// Everything between phases, all of it in `memory`.
typedef struct {
    float *x, *normed, *qkv, *logits, *weights, *y, *scratch, *partial;
    char *in, *attended, *gathered, *activated;
    int32_t *ids, *order, *place;
    int64_t* runs;  // [0]: how many; Run after Run
    long d_row, qkv_row, in_row, attended_row, activated_row;  // of x, normed and y; of qkv; the rest in bytes
    long rows, items;  // routed rows at most; items of attention
    Layout layout;
} Memory;

INLINE long routed(const Layer* l, long T) { return T * at_least(l->chosen, 1); }
INLINE long max_runs(long experts, long rows) { return experts + rows / BLOCK_ROWS + 1; }
INLINE long groups_of(const Segment* s, const Model* m) { return parts(s->rows * (m->heads / m->kv_heads), TILES * W); }

static long items_of(const Model* m, const Pass* p) {
    long items = 0;
    for (long i = 0; i < p->segments; i++) items += m->kv_heads * groups_of(p->segments_Q + i, m);
    return items;
}
static long splits_of(const Pass* p) {
    long longest = 0;
    for (long i = 0; i < p->segments; i++) longest = at_least(longest, p->segments_Q[i].start + p->segments_Q[i].rows);
    return parts(longest, SPLIT);
}
// Whether threads share a request's positions.
INLINE int shared(const Pass* p, long items, long splits) { return splits > 1 && items < 4 * p->threads; }

static void* carve(char** at, long bytes) {
    void* here = *at;
    *at += padded(bytes, 64);
    return here;
}

static Memory memory_of(const Model* m, const Pass* p, char** at) {
    long T = at_least(p->tokens, p->wanted), wide = 0, act = 0, rows = 0, in = 0, gathered = 0, attended = 0, runs = 0, E = 0, K = 1;
    for (long i = 0; i < m->n_layers; i++) {
        const Layer* l = m->layers + i;
        wide = at_least(wide, l->qkv.panels * NR);
        in = at_least(in, at_least(row_bytes(&l->up), at_least(row_bytes(&l->qkv), row_bytes(&m->head))));
        attended = at_least(attended, row_bytes(&l->wo));
        gathered = at_least(gathered, row_bytes(&l->up));
        act = at_least(act, row_bytes(&l->down));
        rows = at_least(rows, routed(l, T));
        runs = at_least(runs, max_runs(l->experts, routed(l, T)));
        E = at_least(E, padded(l->experts, NR));
        K = at_least(K, l->chosen);
    }
    Memory s = {.rows = rows, .qkv_row = wide, .in_row = in, .attended_row = attended, .activated_row = act};
    s.d_row = padded(m->d_model, NR);
    s.layout = (Layout){m->cache_kind, m->block_size, m->heads, m->kv_heads, m->width, p->blocks};
    s.items = items_of(m, p);
    long splits = splits_of(p), more = BLOCK_ROWS;
    s.x = carve(at, 4 * T * s.d_row);
    s.normed = carve(at, 4 * (T + more) * s.d_row);
    s.in = carve(at, (T + more) * in);
    s.qkv = carve(at, 4 * T * wide);
    s.attended = carve(at, (T + more) * attended);
    s.logits = carve(at, 4 * T * E);
    s.ids = carve(at, 4 * T * K);
    s.weights = carve(at, 4 * T * K);
    s.order = carve(at, 4 * rows);
    s.place = carve(at, 4 * rows);
    s.runs = carve(at, 8 + runs * sizeof(Run));
    s.gathered = carve(at, (rows + more) * gathered);
    s.activated = carve(at, (rows + more) * act);
    s.y = carve(at, 4 * rows * s.d_row);
    s.scratch = carve(at, 4 * p->threads * padded(scratch_floats(&s.layout) + part_floats(&s.layout), 16));
    s.partial = carve(at, shared(p, s.items, splits) ? 4 * s.items * splits * part_floats(&s.layout) : 0);
    return s;
}

// -------------------------------------------------------------------------------------------------------------- phases

// All panels of a weight times all rows, cut so that threads find equal work: runs of rows x groups of panels.
static void spread(const Weight* w, const Run* runs, long n_runs, const char* in, const Finish* f, long threads) {
    long groups = at_least(1, at_most(w->panels, 16 * threads / at_least(n_runs, 1)));
#pragma omp for schedule(dynamic)
    for (long item = 0; item < n_runs * groups; item++) {
        const Run* run = runs + item / groups;
        long g = item % groups;
        multiply(w, run->expert, g * w->panels / groups, (g + 1) * w->panels / groups, in, run->row, run->rows, f);
    }
}

// Rows that are all of one weight.
static void dense(const Weight* w, long rows, const char* in, const Finish* f, long threads) {
    long size = cached_rows(w), n = parts(rows, size);
    Run runs[n];
    for (long i = 0; i < n; i++) runs[i] = (Run){0, i * size, at_most(size, rows - i * size)};
    spread(w, runs, n, in, f, threads);
}

static void embed(const Model* m, const Pass* p, Memory* s) {
    long D = m->d_model, size = SIZE[m->embedding_kind];
#pragma omp for
    for (long t = 0; t < p->tokens; t++)
        to_floats(m->embedding_kind, (const char*)m->embedding_VD + p->ids_T[t] * D * size, s->x + t * s->d_row, D, 1);
}

// x / rms(x) * weight, in float32 and as products with `next` read it; row i is row of[i], or i.
static void norm(const Model* m, const Memory* s, const float* weight_D, const Weight* next, const int64_t* of, long rows) {
    long D = m->d_model, kind = input_kind(next), bytes = row_bytes(next);
#pragma omp for
    for (long i = 0; i < rows; i++) {
        const float* x = s->x + (of ? of[i] : i) * s->d_row;
        float* y = s->normed + i * s->d_row;
        vf squares = {};
        long d = 0;
        for (; d + W <= D; d += W) squares += load(x + d) * load(x + d);
        float sum = 0;
        for (long lane = 0; lane < W; lane++) sum += squares[lane];
        for (; d < D; d++) sum += x[d] * x[d];
        float by = 1 / sqrtf(sum / D + (float)m->eps);
        for (d = 0; d < D; d++) y[d] = x[d] * by * weight_D[d];
        char* in = s->in + i * bytes;
        from_floats(kind, y, in, D);
        memset(in + D * SIZE[kind], 0, (padded_inputs(next) - D) * SIZE[kind]);
    }
}

static void turn(float* x, const float* cos, const float* sin, long C) {
    for (long c = 0; c < C / 2; c++) {
        float a = x[c], b = x[c + C / 2];
        x[c] = a * cos[c] + b * sin[c];
        x[c + C / 2] = b * cos[c + C / 2] + a * sin[c + C / 2];
    }
}

static void attention(const Model* m, const Pass* p, Memory* s, long layer) {
    const Layer* l = m->layers + layer;
    const Layout* lay = &s->layout;
    long H = m->heads, N = m->kv_heads, C = m->width, bytes = row_bytes(&l->wo), group = H / N;
    int kind = input_kind(&l->wo);
#pragma omp for
    for (long t = 0; t < p->tokens; t++) {
        const Segment* g = p->segments_Q;
        while (t >= g->row + g->rows) g++;
        long position = g->start + t - g->row;
        float* row = s->qkv + t * s->qkv_row;
        for (long h = 0; h < H + N; h++) turn(row + h * C, m->cos + position * C, m->sin + position * C, C);
        keep(lay, m->caches + layer, slot_of(lay, g, position), row + H * C, row + (H + N) * C);
        char* end = s->attended + t * bytes + H * C * SIZE[kind];
        memset(end, 0, (padded_inputs(&l->wo) - H * C) * SIZE[kind]);
    }
    long splits = splits_of(p), size = part_floats(lay), share = shared(p, s->items, splits);
    long scratch_size = padded(scratch_floats(lay) + size, 16);
    Scratch scratch = scratch_in(lay, s->scratch + omp_get_thread_num() * scratch_size);
    float* whole = s->scratch + omp_get_thread_num() * scratch_size + scratch_floats(lay);
    long work = s->items * (share ? splits : 1);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < work; i++) {
        long item = share ? i / splits : i, left = item;
        const Segment* g = p->segments_Q;
        for (; left >= N * groups_of(g, m); g++) left -= N * groups_of(g, m);
        long head = left % N, row = left / N * TILES * W, rows = at_most(TILES * W, g->rows * group - row);
        long mine = parts(g->start + (row + rows - 1) / group + 1, SPLIT);
        set_queries(lay, g, &scratch, s->qkv, s->qkv_row, head, row, rows);
        if (share) {
            if (i % splits < mine)
                attend_split(lay, m->caches + layer, g, &scratch, head, row, rows, i % splits, s->partial + i * size);
            continue;
        }
        for (long split = 0; split < mine; split++) {
            attend_split(lay, m->caches + layer, g, &scratch, head, row, rows, split, split ? scratch.part : whole);
            if (split) merge(lay, whole, scratch.part, rows);
        }
        put_attended(lay, g, whole, head, row, rows, s->attended, bytes, kind);
    }
    if (!share) return;
#pragma omp for
    for (long item = 0; item < s->items; item++) {
        long left = item;
        const Segment* g = p->segments_Q;
        for (; left >= N * groups_of(g, m); g++) left -= N * groups_of(g, m);
        long head = left % N, row = left / N * TILES * W, rows = at_most(TILES * W, g->rows * group - row);
        long mine = parts(g->start + (row + rows - 1) / group + 1, SPLIT);
        float* first = s->partial + item * splits * size;
        for (long split = 1; split < mine; split++) merge(lay, first, first + split * size, rows);
        put_attended(lay, g, first, head, row, rows, s->attended, bytes, kind);
    }
}

// The chosen experts of a row, in falling order of score, ties to the lower index, and the softmax over their logits.
static void choose(const Layer* l, const float* logits_E, int32_t* ids_K, float* weights_K) {
    long E = l->experts, K = l->chosen;
    float scores[E], top = -INFINITY, sum = 0;
    for (long e = 0; e < E; e++) top = logits_E[e] > top ? logits_E[e] : top;
    for (long e = 0; e < E; e++) scores[e] = logits_E[e];
    if (l->bias_E) {
        for (long e = 0; e < E; e++) sum += scores[e] = expf(logits_E[e] - top);
        for (long e = 0; e < E; e++) scores[e] = scores[e] / sum + l->bias_E[e];
    }
    uint8_t taken[E];
    memset(taken, 0, E);
    for (long k = 0; k < K; k++) {
        long best = -1;
        for (long e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
        taken[best] = 1;
        ids_K[k] = best;
    }
    sum = 0;
    top = logits_E[ids_K[0]];
    for (long k = 1; k < K; k++) top = logits_E[ids_K[k]] > top ? logits_E[ids_K[k]] : top;
    for (long k = 0; k < K; k++) sum += weights_K[k] = expf(logits_E[ids_K[k]] - top);
    for (long k = 0; k < K; k++) weights_K[k] /= sum;
}

static void route(const Model* m, const Pass* p, Memory* s, long layer) {
    const Layer* l = m->layers + layer;
    long T = p->tokens, E = padded(l->experts, NR), K = l->chosen;
    Finish logits = {.what = PUT, .out = s->logits, .out_row = E, .width = E};
#pragma omp for
    for (long first = 0; first < T; first += MOST_ROWS) {
        long rows = at_most(MOST_ROWS, T - first);
        // The norm in float32, whatever the model is in.
        float c[MOST_ROWS * NR];
        for (long panel = 0; panel < l->router.panels; panel++) {
            const char* data = (const char*)l->router.data + panel * panel_bytes(&l->router);
            panel_sums(&l->router, data, (const char*)(s->normed + first * s->d_row), 4 * s->d_row, rows, c);
            finish(&logits, NULL, panel, first, rows, c);
        }
        for (long t = first; t < first + rows; t++) {
            choose(l, s->logits + t * E, s->ids + t * K, s->weights + t * K);
            if (!p->chosen_LTK) continue;
            for (long k = 0; k < K; k++) {
                p->chosen_LTK[(layer * T + t) * K + k] = s->ids[t * K + k];
                p->weights_LTK[(layer * T + t) * K + k] = s->weights[t * K + k];
            }
        }
    }
}

// Rows in the order of their experts, and the runs that they make.
static void permute(const Pass* p, Memory* s, const Layer* l) {
    long T = p->tokens, K = l->chosen, E = l->experts, size = cached_rows(&l->up), bytes = row_bytes(&l->up);
#pragma omp single
    {
        int32_t next[E + 1];
        memset(next, 0, sizeof(next));
        for (long r = 0; r < T * K; r++) next[s->ids[r] + 1]++;
        Run* run = (Run*)(s->runs + 1);
        for (long e = 0; e < E; e++) {
            for (long row = 0; row < next[e + 1]; row += size)
                *run++ = (Run){e, next[e] + row, at_most(size, next[e + 1] - row)};
            next[e + 1] += next[e];
        }
        s->runs[0] = run - (Run*)(s->runs + 1);
        for (long r = 0; r < T * K; r++) {
            s->place[r] = next[s->ids[r]]++;
            s->order[s->place[r]] = r / K;
        }
    }
#pragma omp for
    for (long r = 0; r < T * K; r++) memcpy(s->gathered + r * bytes, s->in + s->order[r] * bytes, bytes);
}

static void mlp(const Pass* p, Memory* s, const Layer* l, int down) {
    const Weight* w = down ? &l->down : &l->up;
    Finish f = {.what = l->activation, .activated = s->activated, .activated_kind = input_kind(&l->down)};
    f.activated_row = row_bytes(&l->down);
    if (down) f = (Finish){.what = l->chosen ? PUT : ADD, .out = l->chosen ? s->y : s->x, .out_row = s->d_row, .width = w->outputs};
    if (l->chosen) spread(w, (Run*)(s->runs + 1), s->runs[0], down ? s->activated : s->gathered, &f, p->threads);
    else dense(w, p->tokens, down ? s->activated : s->in, &f, p->threads);
}

static void combine(const Model* m, const Pass* p, Memory* s, const Layer* l) {
    long K = l->chosen;
#pragma omp for
    for (long t = 0; t < p->tokens; t++) {
        float* x = s->x + t * s->d_row;
        for (long k = 0; k < K; k++) {
            const float* y = s->y + s->place[t * K + k] * s->d_row;
            float weight = s->weights[t * K + k];
            for (long d = 0; d < m->d_model; d++) x[d] += weight * y[d];
        }
    }
}

static void project(const Weight* w, const Pass* p, const char* in, int what, float* out, long out_row) {
    Finish f = {.what = what, .out = out, .out_row = out_row, .width = w->outputs};
    dense(w, p->tokens, in, &f, p->threads);
}

static void head(const Model* m, const Pass* p, Memory* s) {
    norm(m, s, m->norm_D, &m->head, p->wanted_N, p->wanted);
    Finish f = {.what = PUT, .out = p->logits_NV, .out_row = m->vocabulary, .width = m->vocabulary};
    dense(&m->head, p->wanted, s->in, &f, p->threads);
}

// Of a layer, in this order: moe/serve/cpu.py has their names.
enum { NORM, QKV, ATTENTION, WO, MLP_NORM, ROUTER, PERMUTE, UP, DOWN, COMBINE, PHASES };

static void run_phase(const Model* m, const Pass* p, Memory* s, long phase) {
    if (phase == 0) { embed(m, p, s); return; }
    if (phase == 1 + PHASES * m->n_layers) { head(m, p, s); return; }
    long layer = (phase - 1) / PHASES;
    const Layer* l = m->layers + layer;
    switch ((phase - 1) % PHASES) {
        case NORM: norm(m, s, l->attention_norm_D, &l->qkv, NULL, p->tokens); break;
        case QKV: project(&l->qkv, p, s->in, PUT, s->qkv, s->qkv_row); break;
        case ATTENTION: attention(m, p, s, layer); break;
        case WO: project(&l->wo, p, s->attended, ADD, s->x, s->d_row); break;
        case MLP_NORM: norm(m, s, l->mlp_norm_D, &l->up, NULL, p->tokens); break;
        case ROUTER: if (l->chosen) route(m, p, s, layer); break;
        case PERMUTE: if (l->chosen) permute(p, s, l); break;
        case UP: mlp(p, s, l, 0); break;
        case DOWN: mlp(p, s, l, 1); break;
        case COMBINE: if (l->chosen) combine(m, p, s, l); break;
    }
}

// ------------------------------------------------------------------------------------------------ what Python calls

int64_t lanes(void) { return W; }

int64_t bytes_needed(const Model* m, const Pass* p) {
    char* at = 0;
    memory_of(m, p, &at);
    return (int64_t)at + 64;
}

// Phases [first, last); what lies between two calls stays in the pass's memory.
void run(const Model* m, const Pass* p, int64_t first, int64_t last) {
    char* at = (char*)padded((long)p->memory, 64);
    Memory s = memory_of(m, p, &at);
#pragma omp parallel num_threads(p->threads) firstprivate(s)
    {
        tiles_on();
        for (long phase = first; phase < last; phase++) run_phase(m, p, &s, phase);
        tiles_off();
    }
}

// One weight times rows of float32, for tests: y [rows][outputs].
void multiply_rows(const Weight* w, int64_t expert, const float* x, int64_t rows, float* y, char* memory) {
    long bytes = row_bytes(w);
    int kind = input_kind(w);
    char* in = (char*)padded((long)memory, 64);
    memset(in, 0, (rows + BLOCK_ROWS) * bytes);
    for (long i = 0; i < rows; i++) from_floats(kind, x + i * w->inputs, in + i * bytes, w->inputs);
    Finish f = {.what = PUT, .out = y, .out_row = w->outputs, .width = w->outputs};
    tiles_on();
    multiply(w, expert, 0, w->panels, in, 0, rows, &f);
    tiles_off();
}

// The activations of an up product whose one input is 1, as the down product reads them, for tests.
void activate_row(const Weight* up, int64_t activation, const Weight* down, float* y) {
    float in[32 * BLOCK_ROWS] = {1}, act[padded(down->inputs, 32) + NR];
    Finish f = {.what = activation, .activated = (char*)act, .activated_kind = F32, .activated_row = row_bytes(down)};
    multiply(up, 0, 0, up->panels, (const char*)in, 0, 1, &f);
    memcpy(y, act, 4 * down->inputs);
}
