/* Forward passes of a fairseq Transformer over few tokens, on a CPU.
 *
 * Decoding reads every weight once per pass and multiplies it with a handful of rows, so what counts is to stream the
 * weights at the speed of memory and to waste no time between products. One call of bild_forward is one OpenMP region:
 * embedding, layers and vocabulary projection, with barriers between the steps.
 *
 * A batch is ragged: a sentence reads as many tokens as it has, from where it is, and nothing is padded. The result of
 * a token does not depend, to the last bit, on what else is read in the same call: every sum is formed in one order.
 *
 * The structs are mirrored in structs.py. Matrices are row-major; T is the number of tokens in a call.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12 /* rows that share a weight in registers */
#define WIDE 5  /* up to so many rows, two panels side by side fit in registers, too */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6
#define WIDE 2
#else
#define LANES 4
#define ROWS 6
#define WIDE 2
#endif
#define PANEL (2 * LANES) /* outputs that are computed together */
#define AHEAD 8192        /* bytes of weights that are fetched in advance */
#define BURST 8           /* inputs whose weights are fetched together */
#define FEW 8             /* up to so many rows, every thread normalizes them all rather than wait for the others */
#define SPINS 2000        /* looks at a barrier before a thread gives up its core: some 50 microseconds */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { FLOAT32, FLOAT16, BFLOAT16, INT8 };
enum { NONE, RELU, GELU };

typedef struct {
    int64_t in, out;
    int64_t type;         /* of the weights */
    const void *weight; /* (panels, in, PANEL) */
    const float *scale, *bias; /* (out, rounded up to panels); scale only for INT8, either may be NULL */
} Linear;

typedef struct {
    const float *weight, *bias; /* (dim); weight is NULL for no norm at all */
    double eps;
} Norm;

typedef struct {
    Linear qkv, self_out, source_query, source_out, fc1, fc2;
    Norm self_norm, source_norm, final_norm;
} Layer;

typedef struct {
    int64_t dim, heads, ffn, pre_norm, activation, causal, attends_to_source;
    double embed_scale;
    const float *embedding; /* (vocabulary, dim) */
    const float *positions; /* (positions, dim) or NULL */
    Norm embed_norm;
    Norm output_norm; /* of an encoder */
    const Layer *layers;
} Stack;

typedef struct {
    Norm norm;
    Linear vocabulary;
} Head;

/* What has been read of a batch. Keys lie transposed, so that the scores of neighbouring positions are neighbours. */
typedef struct {
    int64_t capacity;    /* positions, a multiple of PANEL */
    int64_t layer_size;  /* floats from one layer's keys (or values) to the next layer's */
    float *keys;         /* (layers, sentences, heads, head_dim, capacity) */
    float *values;       /* (layers, sentences, heads, capacity, head_dim) */
    float *hidden; /* (sentences, capacity, dim): what some layers have left for the ones above, or NULL */
    int64_t sentences;
    int64_t source_capacity; /* source positions, padded */
    const int64_t *source_lengths;
    float *source_keys;   /* (layers, sentences, heads, head_dim, source_capacity) */
    float *source_values; /* (layers, sentences, heads, source_capacity, head_dim) */
} State;

typedef struct {
    int64_t sentences;                     /* that this call reads */
    int64_t *rows, *starts, *counts;       /* (sentences): which of the state, from which position on, how many tokens */
    int64_t tokens;                        /* T, the sum of counts */
    int64_t *token;                        /* (T), or NULL to go on from the state's hidden states */
    float *x;                              /* (T, dim): where hidden states are computed */
    int64_t first, last;                   /* layers first .. last - 1 */
    int64_t keep;                          /* leave hidden states in the state */
    const Head *head;                      /* NULL for no predictions */
    int64_t predictions;
    int64_t *selected;       /* (predictions): which tokens to predict after */
    float *logits;           /* (predictions, logits_stride) */
    int64_t logits_stride;   /* a multiple of PANEL */
    float *log_normalizer;   /* (predictions): logsumexp of the logits */
    float *workspace;
    int64_t threads;
} Call;

static inline int64_t weight_size(int64_t type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Where the part-th of so many parts of some units begins. */
static inline int64_t share(int64_t units, int64_t part, int64_t parts) { return units * part / parts; }

/* Where the threads of one region wait for each other. There are some ten such waits a layer, so OpenMP's barrier, which
 * spins for milliseconds, brings decoding to a halt where other programs keep the cores busy: each time the thread that
 * all wait for gets no core before a time slice ends. Here a thread that has waited for long sleeps. */
typedef struct {
    _Alignas(64) int32_t arrived;
    _Alignas(64) int32_t phase; /* how often all have arrived */
    int32_t sleeping;
} Barrier;

static _Thread_local Barrier *barrier; /* of the region that the thread is in */

static void sleep_until_change(int32_t *value, int32_t old) {
#if defined(__linux__)
    while (__atomic_load_n(value, __ATOMIC_SEQ_CST) == old) syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, NULL);
#else
    while (__atomic_load_n(value, __ATOMIC_SEQ_CST) == old) sched_yield();
#endif
}

static void wake_all(int32_t *value) {
#if defined(__linux__)
    syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX);
#endif
}

/* Returns when every thread of the region has called it. */
static void wait_for_all(void) {
    Barrier *b = barrier;
    int32_t phase = __atomic_load_n(&b->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->sleeping, __ATOMIC_SEQ_CST)) wake_all(&b->phase);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) != phase) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    __atomic_add_fetch(&b->sleeping, 1, __ATOMIC_SEQ_CST);
    sleep_until_change(&b->phase, phase);
    __atomic_sub_fetch(&b->sleeping, 1, __ATOMIC_SEQ_CST);
}

static inline vec broadcast(float x) { return x - (vec){0}; }

static inline vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

static inline __attribute__((always_inline)) vec load(int type, const void *weight, int64_t offset) {
    if (type == FLOAT32) return *(const vec *)((const float *)weight + offset);
    if (type == BFLOAT16) {
        halves h = *(const halves *)((const uint16_t *)weight + offset);
        return (vec)(__builtin_convertvector(h, uvec) << 16);
    }
    if (type == FLOAT16) {
        const uint16_t *w = (const uint16_t *)weight + offset;
#if defined(__AVX512F__)
        return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)w));
#elif defined(__AVX2__) && defined(__F16C__)
        return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)w));
#else /* a finite half's exponent and mantissa, moved into place, are 2^-112 times its value */
        uvec h = __builtin_convertvector(*(const halves *)w, uvec);
        vec size = (vec)((h & 0x7fff) << 13) * 0x1p112f;
        return (vec)((uvec)size | (h & 0x8000) << 16);
#endif
    }
    const int8_t *b = (const int8_t *)weight + offset;
#if defined(__AVX512F__) /* compilers make a poor job of this conversion */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)b)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(b)));
#else
    return __builtin_convertvector(*(const bytes *)b, vec);
#endif
}

/* With few rows several panels go side by side: a sum waits for its last addition, so that others must be under way. */
#define SUMS (2 * ROWS > 8 ? 2 * ROWS : 8)
typedef vec Sums[SUMS]; /* (panels, rows, 2) */

/* sums[(q rows + r) 2 ..] = sum_i x[r][i] * weight[q distance + i stride ..], for one panel q or several. */
static inline __attribute__((always_inline)) void multiply_rows(int panels, int rows, int type, const float *x,
                                                                int64_t ldx, int64_t in, const void *weight,
                                                                int64_t stride, int64_t distance, Sums sums) {
    Sums s;
    for (int j = 0; j < panels * rows * 2; j++) s[j] = (vec){0};
    for (int64_t i = 0; i < in;) {
        if (rows > 1) /* with one row memory is busy anyway, and the processor's own guesses do better */
            for (int q = 0; q < panels; q++) {
                const char *ahead = (const char *)weight + (q * distance + i * stride) * weight_size(type) + AHEAD;
                for (int line = 0; line < BURST * PANEL * weight_size(type); line += 64) __builtin_prefetch(ahead + line);
            }
        for (int64_t end = i + BURST < in ? i + BURST : in; i < end; i++) {
            vec low[4], high[4];
            for (int q = 0; q < panels; q++) {
                int64_t at = q * distance + i * stride;
                low[q] = load(type, weight, at), high[q] = load(type, weight, at + LANES);
            }
            for (int r = 0; r < rows; r++) {
                vec b = broadcast(x[r * ldx + i]);
                for (int q = 0; q < panels; q++) {
                    s[(q * rows + r) * 2] += b * low[q];
                    s[(q * rows + r) * 2 + 1] += b * high[q];
                }
            }
        }
    }
    for (int j = 0; j < panels * rows * 2; j++) sums[j] = s[j];
}

/* How many panels go side by side. */
static inline int64_t abreast(int64_t rows) { return rows == 1 ? 4 : rows <= WIDE ? 2 : 1; }

static inline __attribute__((always_inline)) void multiply_type(int type, int64_t panels, int64_t rows, const float *x,
                                                                int64_t ldx, int64_t in, const void *panel, Sums sums) {
#define CASE(PANELS, N) \
    case PANELS * 16 + N: multiply_rows(PANELS, N, type, x, ldx, in, panel, PANEL, in * PANEL, sums); break;
    switch (panels * 16 + rows) { /* constant numbers keep the sums in registers */
        CASE(4, 1)
        CASE(2, 1)
        CASE(2, 2)
        CASE(1, 1)
        CASE(1, 2)
        CASE(1, 3)
        CASE(1, 4)
        CASE(1, 5)
        CASE(1, 6)
#if WIDE > 2
        CASE(2, 3)
        CASE(2, 4)
        CASE(2, 5)
#endif
#if ROWS > 6
        CASE(1, 7)
        CASE(1, 8)
        CASE(1, 9)
        CASE(1, 10)
        CASE(1, 11)
        CASE(1, 12)
#endif
    }
#undef CASE
}

static void multiply(int64_t type, int64_t panels, int64_t rows, const float *x, int64_t ldx, int64_t in,
                     const void *panel, Sums sums) {
    if (type == FLOAT32)
        multiply_type(FLOAT32, panels, rows, x, ldx, in, panel, sums);
    else if (type == FLOAT16)
        multiply_type(FLOAT16, panels, rows, x, ldx, in, panel, sums);
    else if (type == BFLOAT16)
        multiply_type(BFLOAT16, panels, rows, x, ldx, in, panel, sums);
    else
        multiply_type(INT8, panels, rows, x, ldx, in, panel, sums);
}

static inline vec vec_exp(vec x) {
    vec low = broadcast(-87.0f), high = broadcast(88.0f); /* comparisons with NaN are false: it stays NaN */
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* rounds to the nearest integer, kept in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23); /* the shift drops the bits that 12582912 has set above */
}

/* x * P(X <= x) for a standard normal X, with erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7). */
static inline vec gelu(vec x) {
    vec z = choose(x < 0, -x, x) * 0.70710678f;
    vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = broadcast(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec erf = 1.0f - p * t * vec_exp(-z * z);
    return 0.5f * x * (1.0f + choose(x < 0, -erf, erf));
}

/* What is left to do with one row's sums of one panel, p: scale, bias, activation, residual. */
static inline void finish(const Linear *l, int64_t p, const vec *sums, float *y, const float *residual, int activation) {
    for (int half = 0; half < 2; half++) {
        int64_t at = p * PANEL + half * LANES, width = l->out - at < LANES ? l->out - at : LANES;
        if (width <= 0) continue;
        vec v = sums[half];
        if (l->scale) v *= *(const vec *)(l->scale + at);
        if (l->bias) v += *(const vec *)(l->bias + at);
        if (activation == RELU) v = choose(v < 0, (vec){0}, v);
        if (activation == GELU) v = gelu(v);
        if (width == LANES) {
            if (residual) v += *(const vec *)(residual + at);
            *(vec *)(y + at) = v;
        } else
            for (int64_t i = 0; i < width; i++) y[at + i] = v[i] + (residual ? residual[at + i] : 0);
    }
}

/* This thread's share of y = activation(x W + bias) + residual. */
static void linear(const Linear *l, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy,
                   const float *residual, int activation, int64_t threads) {
    int64_t panels = (l->out + PANEL - 1) / PANEL, thread = omp_get_thread_num();
    int64_t end = share(panels, thread + 1, threads), count;
    for (int64_t p = share(panels, thread, threads); p < end; p += count) {
        for (count = abreast(rows); count > end - p; count /= 2) continue;
        const char *weight = (const char *)l->weight + p * l->in * PANEL * weight_size(l->type);
        for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
            int64_t n = rows - r0 < ROWS ? rows - r0 : ROWS;
            Sums sums;
            multiply(l->type, count, n, x + r0 * ldx, ldx, l->in, weight, sums);
            for (int64_t q = 0; q < count; q++)
                for (int64_t r = 0; r < n; r++)
                    finish(l, p + q, sums + (q * n + r) * 2, y + (r0 + r) * ldy,
                           residual ? residual + (r0 + r) * ldy : NULL, activation);
        }
    }
}

static void normalize_row(const Norm *norm, const float *x, float *y, int64_t dim) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += x[i];
    float mean = sum / dim;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(squares / dim + (float)norm->eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) y[i] = (x[i] - mean) * scale * norm->weight[i] + norm->bias[i];
}

/* Layer norm of all rows by all threads; y may be x. */
static void normalize_share(const Norm *norm, const float *x, int64_t rows, int64_t dim, float *y) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t r = share(rows, thread, threads); r < share(rows, thread + 1, threads); r++)
        normalize_row(norm, x + r * dim, y + r * dim, dim);
    wait_for_all();
}

/* Layer norm of all rows, for this thread's use: few rows into its own buffer, many together into the shared one.
 * Whoever calls it sees a complete x; nobody writes x before the next barrier. */
static const float *normalize(const Norm *norm, const float *x, int64_t rows, int64_t dim, float *own, float *shared) {
    if (!norm->weight) return x;
    if (rows <= FEW) {
        for (int64_t r = 0; r < rows; r++) normalize_row(norm, x + r * dim, own + r * dim, dim);
        return own;
    }
    normalize_share(norm, x, rows, dim, shared);
    return shared;
}

/* The next n floats, or -inf beyond them. */
static inline vec load_some(const float *x, int64_t n) {
    if (n >= LANES) return *(const vec *)x;
    vec v = broadcast(-INFINITY);
    memcpy(&v, x, n * sizeof(float));
    return v;
}

static inline void store_some(float *x, vec v, int64_t n) { memcpy(x, &v, (n < LANES ? n : LANES) * sizeof(float)); }

static inline float vec_max(vec v) {
    float max = v[0];
    for (int i = 1; i < LANES; i++) max = v[i] > max ? v[i] : max;
    return max;
}

static inline float vec_sum(vec v) {
    float sum = v[0];
    for (int i = 1; i < LANES; i++) sum += v[i];
    return sum;
}

/* Softmax in place over n scores. */
static void softmax(float *scores, int64_t n) {
    vec top = broadcast(-INFINITY), sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec s = load_some(scores + i, n - i);
        top = choose(s > top, s, top);
    }
    float max = vec_max(top);
    for (int64_t i = 0; i < n; i += LANES) {
        vec s = load_some(scores + i, n - i);
        vec e = choose(s == -INFINITY, (vec){0}, vec_exp(s - max));
        store_some(scores + i, e, n - i);
        sum += e;
    }
    float scale = 1.0f / vec_sum(sum);
    for (int64_t i = 0; i < n; i++) scores[i] *= scale;
}

/* One head's attention of one query (head_dim) to n positions. */
static void attend(const float *query, const float *keys, const float *values, int64_t capacity, int64_t n,
                   int64_t head_dim, float *scores, float *out) {
    float scale = 1.0f / sqrtf((float)head_dim);
    Sums sums;
    for (int64_t t = 0; t < n; t += PANEL) {
        multiply_rows(1, 1, FLOAT32, query, 0, head_dim, keys + t, capacity, 0, sums);
        *(vec *)(scores + t) = sums[0] * scale;
        *(vec *)(scores + t + LANES) = sums[1] * scale;
    }
    softmax(scores, n);
    for (int64_t d = 0; d < head_dim; d += PANEL) {
        multiply_rows(1, 1, FLOAT32, scores, 0, n, values + d, head_dim, 0, sums);
        int64_t width = head_dim - d < PANEL ? head_dim - d : PANEL;
        memcpy(out + d, sums, width * sizeof(float));
    }
}

/* Keeps the new tokens' keys and values and attends to all that each may look at: qkv (T, 3 dim) -> out (T, dim). */
static void self_attention(const Stack *stack, const State *state, const Call *call, int64_t layer, const float *qkv,
                           float *out, float *scores) {
    int64_t dim = stack->dim, heads = stack->heads, head_dim = dim / heads, capacity = state->capacity;
    int64_t units = call->sentences * heads, thread = omp_get_thread_num();
    int64_t from = share(units, thread, call->threads), to = share(units, thread + 1, call->threads);
    int64_t offset = 0, sentence = 0;
    for (int64_t unit = from; unit < to; unit++) {
        while (sentence < unit / heads) offset += call->counts[sentence++];
        int64_t head = unit % heads, start = call->starts[sentence], count = call->counts[sentence];
        int64_t at = layer * state->layer_size + (call->rows[sentence] * heads + head) * head_dim * capacity;
        float *keys = state->keys + at, *values = state->values + at;
        for (int64_t i = 0; i < count; i++) {
            const float *key = qkv + (offset + i) * 3 * dim + dim + head * head_dim;
            for (int64_t d = 0; d < head_dim; d++) keys[d * capacity + start + i] = key[d];
            memcpy(values + (start + i) * head_dim, key + dim, head_dim * sizeof(float));
        }
        for (int64_t i = 0; i < count; i++) {
            int64_t seen = start + (stack->causal ? i + 1 : count);
            attend(qkv + (offset + i) * 3 * dim + head * head_dim, keys, values, capacity, seen, head_dim, scores,
                   out + (offset + i) * dim + head * head_dim);
        }
    }
}

static void source_attention(const Stack *stack, const State *state, const Call *call, int64_t layer,
                             const float *query, float *out, float *scores) {
    int64_t dim = stack->dim, heads = stack->heads, head_dim = dim / heads, capacity = state->source_capacity;
    int64_t units = call->sentences * heads, thread = omp_get_thread_num();
    int64_t from = share(units, thread, call->threads), to = share(units, thread + 1, call->threads);
    int64_t offset = 0, sentence = 0;
    for (int64_t unit = from; unit < to; unit++) {
        while (sentence < unit / heads) offset += call->counts[sentence++];
        int64_t head = unit % heads, row = call->rows[sentence];
        int64_t at = ((layer * state->sentences + row) * heads + head) * head_dim * capacity;
        for (int64_t i = offset; i < offset + call->counts[sentence]; i++)
            attend(query + i * dim + head * head_dim, state->source_keys + at, state->source_values + at, capacity,
                   state->source_lengths[row], head_dim, scores, out + i * dim + head * head_dim);
    }
}

static void run_layer(const Stack *stack, const State *state, const Call *call, int64_t index, float *own, float *work) {
    const Layer *layer = stack->layers + index;
    int64_t T = call->tokens, dim = stack->dim, ffn = stack->ffn, threads = call->threads, pre = stack->pre_norm;
    float *x = call->x, *shared = work, *wide = shared + T * dim, *attended = wide + T * (3 * dim);
    float *hidden = attended + T * dim, *scores = own + FEW * dim;
    /* Post-norm keeps x normalized: the sum of a sublayer's residual is normalized when the next one reads it. */
    const float *y = pre ? normalize(&layer->self_norm, x, T, dim, own, shared) : x;
    linear(&layer->qkv, y, dim, T, wide, 3 * dim, NULL, NONE, threads);
    wait_for_all();
    self_attention(stack, state, call, index, wide, attended, scores);
    wait_for_all();
    linear(&layer->self_out, attended, dim, T, x, dim, x, NONE, threads);
    wait_for_all();
    const float *residual = x;
    if (stack->attends_to_source) {
        y = normalize(pre ? &layer->source_norm : &layer->self_norm, x, T, dim, own, shared);
        residual = pre ? x : y;
        linear(&layer->source_query, y, dim, T, wide, dim, NULL, NONE, threads);
        wait_for_all();
        source_attention(stack, state, call, index, wide, attended, scores);
        wait_for_all();
        linear(&layer->source_out, attended, dim, T, x, dim, residual, NONE, threads);
        wait_for_all();
    }
    const Norm *before = pre ? &layer->final_norm : stack->attends_to_source ? &layer->source_norm : &layer->self_norm;
    y = normalize(before, x, T, dim, own, shared);
    residual = pre ? x : y;
    linear(&layer->fc1, y, dim, T, hidden, ffn, NULL, stack->activation, threads);
    wait_for_all();
    linear(&layer->fc2, hidden, ffn, T, x, dim, residual, NONE, threads);
    wait_for_all();
    if (!pre) normalize_share(&layer->final_norm, x, T, dim, x);
}

/* What the lowest layer reads: embeddings, or hidden states that the layers below have left. */
static void enter(const Stack *stack, const State *state, const Call *call) {
    int64_t dim = stack->dim, thread = omp_get_thread_num(), end = share(call->sentences, thread + 1, call->threads);
    for (int64_t s = share(call->sentences, thread, call->threads); s < end; s++) {
        int64_t offset = 0;
        for (int64_t before = 0; before < s; before++) offset += call->counts[before];
        float *x = call->x + offset * dim;
        if (!call->token) {
            int64_t at = call->rows[s] * state->capacity + call->starts[s];
            memcpy(x, state->hidden + at * dim, call->counts[s] * dim * sizeof(float));
            continue;
        }
        for (int64_t i = 0; i < call->counts[s]; i++, x += dim) {
            const float *token = stack->embedding + call->token[offset + i] * dim;
            const float *position = stack->positions ? stack->positions + (call->starts[s] + i) * dim : NULL;
            for (int64_t d = 0; d < dim; d++) x[d] = (float)stack->embed_scale * token[d] + (position ? position[d] : 0);
            if (stack->embed_norm.weight) normalize_row(&stack->embed_norm, x, x, dim);
        }
    }
    wait_for_all();
}

static void keep_hidden(const Stack *stack, const State *state, const Call *call) {
    const float *x = call->x;
    for (int64_t s = 0; s < call->sentences; s++) {
        int64_t at = call->rows[s] * state->capacity + call->starts[s], size = call->counts[s] * stack->dim;
        memcpy(state->hidden + at * stack->dim, x, size * sizeof(float));
        x += size;
    }
}

/* Logits of the selected tokens, and this thread's share of their normalizers: tops and sums (threads, predictions). */
static void predict(const Stack *stack, const Call *call, float *own, float *work, float *tops, float *sums) {
    const Linear *vocabulary = &call->head->vocabulary;
    int64_t dim = stack->dim, n = call->predictions, stride = call->logits_stride, thread = omp_get_thread_num();
    /* Gathered side by side: after few tokens by every thread for itself, else once. */
    float *x = n <= FEW ? own : work;
    int64_t from = n <= FEW ? 0 : share(n, thread, call->threads), to = n <= FEW ? n : share(n, thread + 1, call->threads);
    for (int64_t r = from; r < to; r++) {
        const float *row = call->x + call->selected[r] * dim;
        if (call->head->norm.weight)
            normalize_row(&call->head->norm, row, x + r * dim, dim);
        else
            memcpy(x + r * dim, row, dim * sizeof(float));
    }
    if (n > FEW) wait_for_all();
    linear(vocabulary, x, dim, n, call->logits, stride, NULL, NONE, call->threads);
    int64_t panels = (vocabulary->out + PANEL - 1) / PANEL;
    int64_t begin = PANEL * share(panels, thread, call->threads), end = PANEL * share(panels, thread + 1, call->threads);
    for (int64_t r = 0; r < n; r++) {
        float *logits = call->logits + r * stride;
        for (int64_t i = vocabulary->out; i < end; i++) logits[i] = -INFINITY;
        vec top = broadcast(-INFINITY), sum = {0};
        for (int64_t i = begin; i < end; i += LANES) {
            vec v = *(vec *)(logits + i);
            top = choose(v > top, v, top);
        }
        float max = vec_max(top);
        for (int64_t i = begin; i < end; i += LANES) sum += vec_exp(*(vec *)(logits + i) - max);
        tops[thread * n + r] = max;
        sums[thread * n + r] = vec_sum(sum);
    }
}

static int64_t own_size(const Stack *stack, const State *state) {
    int64_t positions = state->capacity > state->source_capacity ? state->capacity : state->source_capacity;
    return round_up(FEW * stack->dim + positions + PANEL, 64);
}

static int64_t shared_size(const Stack *stack, const Call *call) {
    int64_t rows = call->tokens > call->predictions ? call->tokens : call->predictions;
    return rows * (5 * stack->dim + stack->ffn) + PANEL;
}

int64_t bild_panel(void) { return PANEL; }

/* Floats that a call needs as its workspace. */
int64_t bild_workspace(const Stack *stack, const State *state, const Call *call) {
    return shared_size(stack, call) + call->threads * (own_size(stack, state) + 2 * call->predictions);
}

void bild_forward(const Stack *stack, const State *state, const Call *call) {
    int64_t n = call->predictions, team = 0;
    float *work = call->workspace, *own = work + shared_size(stack, call);
    float *tops = own + call->threads * own_size(stack, state), *sums = tops + call->threads * n;
    Barrier meeting = {0};
#pragma omp parallel num_threads(call->threads)
    {
        barrier = &meeting;
        /* OpenMP may give fewer threads than were asked for. */
        Call here = *call;
        here.threads = omp_get_num_threads();
        if (omp_get_thread_num() == 0) team = here.threads;
        float *mine = own + omp_get_thread_num() * own_size(stack, state);
        enter(stack, state, &here);
        for (int64_t index = here.first; index < here.last; index++) run_layer(stack, state, &here, index, mine, work);
        if (stack->output_norm.weight) normalize_share(&stack->output_norm, here.x, here.tokens, stack->dim, here.x);
        if (n) predict(stack, &here, mine, work, tops, sums);
    }
    for (int64_t r = 0; r < n; r++) {
        float max = -INFINITY, total = 0;
        for (int64_t t = 0; t < team; t++) max = tops[t * n + r] > max ? tops[t * n + r] : max;
        for (int64_t t = 0; t < team; t++) total += sums[t * n + r] * expf(tops[t * n + r] - max);
        call->log_normalizer[r] = max + logf(total);
    }
    if (call->keep) keep_hidden(stack, state, call);
}

/* What holds for every prediction. */
typedef struct {
    int64_t pad, unk, eos; /* pad is impossible */
    double unk_penalty;    /* nats */
} Limits;

/* The most probable token, the first of several, and its log-probability, which is NaN if a logit is. Changes the logits
 * to what the limits leave of them. */
static int64_t best_token(const Limits *limits, float *logits, int64_t out, float log_normalizer, int64_t may_end,
                          float *lprob) {
    logits[limits->pad] = -INFINITY;
    if (limits->unk_penalty) logits[limits->unk] -= (float)limits->unk_penalty;
    if (!may_end) logits[limits->eos] = -INFINITY;
    vec top = broadcast(-INFINITY);
    ivec where = {0};
    for (int64_t i = 0; i < out; i += LANES) {
        vec v = load_some(logits + i, out - i);
        ivec better = v > top, here = (int32_t)i - (ivec){0};
        top = choose(better, v, top);
        where = (better & here) | (~better & where);
    }
    int64_t best = where[0];
    float max = top[0];
    for (int64_t lane = 1; lane < LANES; lane++) {
        int64_t token = where[lane] + lane;
        if (top[lane] > max || (top[lane] == max && token < best)) max = top[lane], best = token;
    }
    *lprob = max - log_normalizer;
    return best;
}

/* What a draft may consist of, and where it ends. */
typedef struct {
    Limits limits;
    double threshold; /* probability; a draft ends with a token that is less likely */
    int64_t steps;    /* room for so many predictions of each sentence */
    int64_t *most;    /* (sentences): so many predictions at most */
    int64_t *minima;  /* (sentences): the end symbol is impossible in so many first predictions */
    int64_t *order;   /* (sentences): scratch */
    int64_t *made;    /* (sentences), out: predictions */
    int64_t *tokens;  /* (sentences, steps), out: the best token of each prediction */
    float *lprobs;    /* (sentences, steps), out: its log-probability */
} Draft;

/* The next token of one sentence; whether it goes on. */
static int64_t predicted(const Draft *draft, int64_t sentence, float *logits, float log_normalizer, int64_t out) {
    int64_t step = draft->made[sentence]++, at = sentence * draft->steps + step;
    int64_t best = best_token(&draft->limits, logits, out, log_normalizer, step >= draft->minima[sentence],
                              draft->lprobs + at);
    draft->tokens[at] = best;
    return best != draft->limits.eos && exp(draft->lprobs[at]) >= draft->threshold && step + 1 < draft->most[sentence];
}

/* Lets every sentence of a call write on by itself: its best token after what it reads, then the one after that, until
 * one is unlikely, the end symbol, not a number, or as many as allowed. The last one is not read any more.
 *
 * The call predicts after each sentence's last token. It and the arrays it points to are used up. */
void bild_draft(const Stack *stack, const State *state, Call *call, const Draft *draft) {
    int64_t out = call->head->vocabulary.out;
    for (int64_t s = 0; s < call->sentences; s++) draft->order[s] = s, draft->made[s] = 0;
    while (call->sentences) {
        bild_forward(stack, state, call);
        int64_t going = 0;
        for (int64_t s = 0; s < call->sentences; s++) {
            int64_t sentence = draft->order[s];
            if (!predicted(draft, sentence, call->logits + s * call->logits_stride, call->log_normalizer[s], out)) continue;
            call->token[going] = draft->tokens[sentence * draft->steps + draft->made[sentence] - 1];
            call->starts[going] = call->starts[s] + call->counts[s];
            call->rows[going] = call->rows[s];
            draft->order[going] = sentence;
            going++;
        }
        for (int64_t s = 0; s < going; s++) call->counts[s] = 1, call->selected[s] = s;
        call->sentences = call->tokens = call->predictions = going;
    }
}

/* A large model's opinion of what stands in its sentences, by prediction. */
typedef struct {
    Limits limits;
    int64_t *standing;    /* the token that stands there */
    int64_t *may_end;     /* whether the end symbol is possible */
    int64_t *best;        /* out: the best token */
    float *best_lprob;    /* out: its log-probability */
    float *standing_lprob; /* out: that of the token that stands there */
} Judgement;

void bild_judge(const Stack *stack, const State *state, const Call *call, const Judgement *judgement) {
    bild_forward(stack, state, call);
    for (int64_t i = 0; i < call->predictions; i++) {
        float *logits = call->logits + i * call->logits_stride, log_normalizer = call->log_normalizer[i];
        judgement->best[i] = best_token(&judgement->limits, logits, call->head->vocabulary.out, log_normalizer,
                                        judgement->may_end[i], judgement->best_lprob + i);
        judgement->standing_lprob[i] = logits[judgement->standing[i]] - log_normalizer;
    }
}

/* Keys and values of the source, for all layers, from what the encoder has made of it.
 *
 * both: of all layers, (layer 0 keys, layer 0 values, layer 1 keys, ...); x (sentences, width, in), each sentence from
 * 0 on; y, scratch, (sentences * width, both->out). */
void bild_source(const Stack *stack, const State *state, const Linear *both, const float *x, int64_t width, float *y,
                 int64_t threads) {
    int64_t dim = stack->dim, heads = stack->heads, head_dim = dim / heads, capacity = state->source_capacity;
    int64_t layers = both->out / (2 * dim), rows = state->sentences * width;
    Barrier meeting = {0};
#pragma omp parallel num_threads(threads)
    {
        barrier = &meeting;
        linear(both, x, both->in, rows, y, both->out, NULL, NONE, omp_get_num_threads());
        wait_for_all();
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < layers * state->sentences * heads; unit++) {
            int64_t head = unit % heads, sentence = unit / heads % state->sentences, layer = unit / heads / state->sentences;
            float *keys = state->source_keys + unit * head_dim * capacity;
            float *values = state->source_values + unit * head_dim * capacity;
            for (int64_t t = 0; t < state->source_lengths[sentence]; t++) {
                const float *key = y + (sentence * width + t) * both->out + layer * 2 * dim + head * head_dim;
                for (int64_t d = 0; d < head_dim; d++) keys[d * capacity + t] = key[d];
                memcpy(values + t * head_dim, key + dim, head_dim * sizeof(float));
            }
        }
    }
}
