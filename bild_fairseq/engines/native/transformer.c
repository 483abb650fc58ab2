/* Forward passes of a fairseq Transformer or a T5 over few tokens, on a CPU.
 *
 * Decoding reads every weight once per pass and multiplies it with a handful of rows, so what counts is to stream the
 * weights at the speed of memory and to waste no time between products. The caller goes through a pass step by step,
 * and threads share the pieces of a step.
 *
 * A batch is ragged: each sentence reads its own number of tokens from its own position on, and nothing is padded. The
 * result of a token does not depend, to the last bit, on what else is read in the same call: every sum is formed in one
 * order.
 *
 * All that a call writes to is in its State and its Pass; a Stack's weights are only read. So calls on different states
 * may run at the same time.
 *
 * structs.py mirrors the structs. Matrices are row-major; T is the number of tokens in a pass.
 */
#include "integers.h"
#include "threads.h"
#include "vectors.h"

#define WINDOW 16384 /* bytes of weights that are fetched in advance, */
#define STREAMS 4    /* in so many places at a time */
#define BURST 8      /* inputs whose weights are fetched together */
#define FEW 8        /* rows that the caller normalizes alone, which takes no longer than to share them out */
#define CHUNK 2048   /* logits that each part of a normalizer is made from, a multiple of PANEL */

/* ---- The model --------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t in, out;
    int64_t type;              /* of the weights */
    const void *weight;        /* (panels, in, PANEL); INT8: (panels, inputs in fours, PANEL, 4) */
    const float *scale, *bias; /* (out, rounded up to panels); scale only for INT8, either may be NULL */
} Linear;

typedef struct {
    const float *weight, *bias; /* (dim); weight is NULL for no norm at all, bias for RMS norm */
    double eps;
} Norm;

typedef struct {
    Linear qkv, self_out, source_query, source_out;
    Linear fc1, fc2; /* with a gate fc1 computes both factors of what fc2 reads, (2 ffn) */
    Norm self_norm, source_norm, final_norm;
} Layer;

typedef struct {
    int64_t dim, heads, head_dim, ffn;
    int64_t pre_norm, causal, attends_to_source;
    int64_t activation, gated; /* gated: the activated half of fc1's output is multiplied by the other half */
    int64_t start_row;         /* whose embedding stands at position 0, whatever token is there; -1 for the token's */
    double embed_scale, score_scale;
    const float *embedding; /* (vocabulary, dim) */
    Norm embed_norm;
    Norm output_norm; /* of an encoder */
    const Layer *layers;
} Stack;

typedef struct {
    Norm norm;
    Linear vocabulary;
    const int64_t *types; /* (vocabulary.out): the token of each output, ascending; NULL: the outputs are all tokens */
} Head;

/* ---- A batch, and one pass over it ------------------------------------------------------------------------------- */

/* What has been read of a batch. Keys are transposed, so that the scores of neighbouring positions are neighbours. */
typedef struct {
    int64_t sentences;
    int64_t capacity;       /* positions, a multiple of PANEL */
    int64_t layer_size;     /* floats from one layer's keys (or values) to the next layer's */
    const float *positions; /* (capacity or more, dim) embeddings, or NULL */
    const float *biases;    /* (heads, 2 reach), or NULL: added to scores, by the key's position - the query's + reach */
    int64_t reach;          /* capacity or more */
    float *keys;            /* (layers, sentences, heads, head_dim, capacity) */
    float *values;          /* (layers, sentences, heads, capacity, head_dim) */
    float *hidden;          /* (sentences, capacity, dim): what a pass through the layers above goes on from, or NULL */
    int64_t source_capacity; /* source positions, padded */
    const int64_t *source_lengths;
    float *source_keys;   /* (layers, sentences, heads, head_dim, source_capacity) */
    float *source_values; /* (layers, sentences, heads, source_capacity, head_dim) */
} State;

typedef struct {
    int64_t sentences;               /* that this pass reads */
    int64_t *rows, *starts, *counts; /* (sentences): row of the state, position of its first new token, new tokens */
    int64_t tokens;                  /* T, the sum of counts */
    int64_t *token;                  /* (T), or NULL to go on from the state's hidden states */
    float *x;                        /* (T, dim): where hidden states are computed */
    int64_t first, end;              /* layers first .. end - 1 */
    int64_t own_first, own_end;      /* then those that only an exit has; none if both are the same */
    int64_t keep;                    /* copy the hidden states into the state */
    const Head *head;                /* NULL for no predictions */
    int64_t predictions;
    int64_t *selected;     /* (predictions): which tokens to predict after */
    float *logits;         /* (predictions, logits_stride) */
    int64_t logits_stride; /* a multiple of PANEL */
    float *log_normalizer; /* (predictions): logsumexp of the logits */
    int64_t threads;
    int64_t room;     /* floats in the block */
    float *workspace; /* the block that a Workspace's buffers are in */
} Pass;

/* Where a pass computes, apart from x. */
typedef struct {
    float *normalized; /* (T, dim) */
    float *projected;  /* (T, 3 attention_dim): queries, keys and values; (T, attention_dim) for the source */
    float *attended;   /* (T, attention_dim) */
    float *inner;      /* (T, ffn), with a gate (T, 2 ffn) */
    float *gated;      /* (T, ffn) with a gate */
    float *selected;   /* (predictions, dim): what the predictions are made from */
    float *integers;   /* what a product multiplies, as integers */
    float *scores;     /* (threads, score_room): one query's attention */
    int64_t score_room;
    float *tops, *sums; /* (predictions, chunks): largest logit of a chunk, and the sum of its exponentials */
    int64_t size;       /* floats of all of them */
} Workspace;

/* Width of the queries, keys and values of all heads. */
static int64_t attention_dim(const Stack *stack) { return stack->heads * stack->head_dim; }

static int64_t chunk_count(const Pass *pass) { return (pass->logits_stride + CHUNK - 1) / CHUNK; }

/* The next buffer of a block. */
static float *carve(float *block, int64_t *used, int64_t floats) {
    float *buffer = block ? block + *used : NULL;
    *used += (floats + 15) / 16 * 16;
    return buffer;
}

static Workspace workspace(const Stack *stack, const State *state, const Pass *pass) {
    int64_t T = pass->tokens, dim = stack->dim, n = pass->predictions, threads = pass->threads;
    int64_t attended = attention_dim(stack), gated = stack->gated ? stack->ffn : 0;
    int64_t positions = state->capacity > state->source_capacity ? state->capacity : state->source_capacity;
    float *block = pass->workspace;
    Workspace w = {.score_room = positions + PANEL};
    w.normalized = carve(block, &w.size, T * dim);
    w.projected = carve(block, &w.size, T * 3 * attended + PANEL); /* attention reads up to a panel beyond a query */
    w.attended = carve(block, &w.size, T * attended);
    w.inner = carve(block, &w.size, T * (stack->ffn + gated));
    w.gated = carve(block, &w.size, T * gated);
    w.selected = carve(block, &w.size, n * dim);
    int64_t widest = dim > stack->ffn ? dim : stack->ffn;
    if (attended > widest) widest = attended;
    w.integers = carve(block, &w.size, integer_room(T > n ? T : n, widest));
    w.scores = carve(block, &w.size, threads * w.score_room);
    w.tops = carve(block, &w.size, n * chunk_count(pass));
    w.sums = carve(block, &w.size, n * chunk_count(pass));
    return w;
}

/* What the steps of a pass need to know. */
typedef struct {
    Crew *crew;
    const Stack *stack;
    const State *state;
    const Pass *pass;
    Workspace w;
} Context;

/* Which token of a pass is the first one of a sentence. */
static int64_t first_token(const Pass *pass, int64_t sentence) {
    int64_t first = 0;
    for (int64_t s = 0; s < sentence; s++) first += pass->counts[s];
    return first;
}

/* Calls work for each of some rows, which is little work. */
static void for_rows(Crew *crew, int64_t rows, Work *work, const void *job) {
    if (rows > FEW)
        share_out(crew, rows, work, job);
    else
        for (int64_t r = 0; r < rows; r++) work(job, 0, r);
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

/* With few rows several panels are computed side by side: each addition to a sum waits for the one before, so other
 * sums must be under way, and memory is read faster in several places at once. */
#define SUMS (2 * (ROWS > MOST_PANELS ? ROWS : MOST_PANELS))
typedef vec Sums[SUMS]; /* (panels, rows, 2) */

/* Fetches weights that follow later, as many bytes as are multiplied now: those from `offset` on of some panels, which
 * lie side by side, `size` bytes each.
 *
 * One core reads memory at its full speed only in several places at once, as its prefetcher starts anew in each page.
 * So panels are read in windows. While one window is multiplied, the next one is fetched in STREAMS places, whether it
 * belongs to one panel or to several. At a panel's end the next one is not its neighbour, if that is read already. */
static inline __attribute__((always_inline)) void fetch(const char *panel, int panels, int64_t size, int64_t offset,
                                                        int64_t bytes) {
    int64_t streams = STREAMS > panels ? STREAMS / panels : 1, window = WINDOW / panels, inside = offset % window;
    for (int64_t s = 0; s < streams; s++) {
        int64_t at = offset - inside + window + s * (window / streams) + inside / streams;
        if (at >= size) at += (panels - 1) * size;
        for (int q = 0; q < panels; q++)
            for (int64_t line = 0; line < bytes / streams; line += 64) __builtin_prefetch(panel + q * size + at + line);
    }
}

/* sums[(q rows + r) 2 ..] = sum_i x[r][i] * weight[q distance + i stride ..], for one panel q or several. */
static inline __attribute__((always_inline)) void multiply_rows(int panels, int rows, int type, const float *x,
                                                                int64_t ldx, int64_t in, const void *weight,
                                                                int64_t stride, int64_t distance, Sums sums) {
    Sums s;
    for (int j = 0; j < panels * rows * 2; j++) s[j] = (vec){0};
    for (int64_t i = 0; i < in;) {
        if (rows > 1) /* with one row memory is busy anyway, and the processor's own guesses do better */
            fetch(weight, panels, distance * weight_size(type), i * stride * weight_size(type),
                  BURST * PANEL * weight_size(type));
        for (int64_t end = i + BURST < in ? i + BURST : in; i < end; i++) {
            vec low[MOST_PANELS], high[MOST_PANELS];
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

/* The same with integers: x (rows, width), weights (inputs in fours, PANEL, 4), sums with their rows' scales. */
static inline __attribute__((always_inline)) void multiply_integers(int panels, int rows, const Integers *x,
                                                                    int64_t r0, int64_t in, const int8_t *weight,
                                                                    Sums sums) {
    const int8_t *row = x->values + r0 * x->width;
    int64_t size = (in + 3) / 4 * 4 * PANEL;
    ivec s[SUMS];
    for (int q = 0; q < panels; q++)
        for (int r = 0; r < rows; r++)
            s[(q * rows + r) * 2] = s[(q * rows + r) * 2 + 1] = first_sum(x->sums[r0 + r]);
    for (int64_t at = 0; at < size; at += 4 * PANEL) {
        if (rows > 1 && at % (4 * BURST * PANEL) == 0)
            fetch((const char *)weight, panels, size, at, 4 * BURST * PANEL);
        ivec low[MOST_PANELS], high[MOST_PANELS];
        for (int q = 0; q < panels; q++) {
            low[q] = load_quads(weight + q * size + at);
            high[q] = load_quads(weight + q * size + at + 4 * LANES);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, row + r * x->width + at / PANEL, sizeof four);
            for (int q = 0; q < panels; q++) {
                s[(q * rows + r) * 2] = add_products(s[(q * rows + r) * 2], low[q], four);
                s[(q * rows + r) * 2 + 1] = add_products(s[(q * rows + r) * 2 + 1], high[q], four);
            }
        }
    }
    for (int j = 0; j < panels * rows * 2; j++)
        sums[j] = __builtin_convertvector(s[j], vec) * x->scales[r0 + j / 2 % rows];
}

/* How many panels are computed side by side. */
static inline int64_t panels_together(int64_t rows) { return rows == 1 ? MOST_PANELS : rows <= PAIRED_ROWS ? 2 : 1; }

/* How many of the rows that are left are computed side by side: as many as fit, but the last ones are not too few for a
 * single panel, as each addition to a sum waits for the one before. */
static inline int64_t rows_together(int64_t left) {
    const int64_t fewest = 4;
    return left <= ROWS ? left : left < ROWS + fewest ? left - fewest : ROWS;
}

/* Calls FUNCTION(panels, rows, ...): constant numbers keep the sums in registers. */
#define CASE(PANELS, N, FUNCTION, ...) \
    case PANELS * 16 + N: FUNCTION(PANELS, N, __VA_ARGS__); break;
#if PAIRED_ROWS > 2
#define MORE_PAIRS(...) \
    CASE(8, 1, __VA_ARGS__) CASE(2, 3, __VA_ARGS__) CASE(2, 4, __VA_ARGS__) CASE(2, 5, __VA_ARGS__)
#else
#define MORE_PAIRS(...)
#endif
#if ROWS > 6
#define MORE_ROWS(...) \
    CASE(1, 7, __VA_ARGS__) CASE(1, 8, __VA_ARGS__) CASE(1, 9, __VA_ARGS__) \
    CASE(1, 10, __VA_ARGS__) CASE(1, 11, __VA_ARGS__) CASE(1, 12, __VA_ARGS__)
#else
#define MORE_ROWS(...)
#endif
#define WITH_CONSTANTS(PANELS, N, ...) \
    switch ((PANELS) * 16 + (N)) { \
        CASE(4, 1, __VA_ARGS__) CASE(2, 1, __VA_ARGS__) CASE(2, 2, __VA_ARGS__) MORE_PAIRS(__VA_ARGS__) \
        CASE(1, 1, __VA_ARGS__) CASE(1, 2, __VA_ARGS__) CASE(1, 3, __VA_ARGS__) \
        CASE(1, 4, __VA_ARGS__) CASE(1, 5, __VA_ARGS__) CASE(1, 6, __VA_ARGS__) MORE_ROWS(__VA_ARGS__) \
    }

/* sums of rows r0 .. r0 + rows - 1 of x, or for INT8 of `integers`, and neighbouring panels. */
static void multiply(const Linear *l, int64_t panels, int64_t rows, const float *x, const Integers *integers,
                     int64_t r0, const void *panel, Sums sums) {
    int64_t in = l->in;
    x += r0 * in;
    if (l->type == FLOAT32)
        WITH_CONSTANTS(panels, rows, multiply_rows, FLOAT32, x, in, in, panel, PANEL, in * PANEL, sums)
    else if (l->type == FLOAT16)
        WITH_CONSTANTS(panels, rows, multiply_rows, FLOAT16, x, in, in, panel, PANEL, in * PANEL, sums)
    else if (l->type == BFLOAT16)
        WITH_CONSTANTS(panels, rows, multiply_rows, BFLOAT16, x, in, in, panel, PANEL, in * PANEL, sums)
    else
        WITH_CONSTANTS(panels, rows, multiply_integers, integers, r0, in, panel, sums)
}

/* What remains to be done with one row's sums of one panel, p: scale, bias, activation, residual. */
static inline void finish(const Linear *l, int64_t p, const vec *sums, float *y, const float *residual,
                          int activation) {
    for (int half = 0; half < 2; half++) {
        int64_t at = p * PANEL + half * LANES, width = l->out - at < LANES ? l->out - at : LANES;
        if (width <= 0) continue;
        vec v = sums[half];
        if (l->scale) v *= *(const vec *)(l->scale + at);
        if (l->bias) v += *(const vec *)(l->bias + at);
        v = activate(activation, v);
        if (width == LANES) {
            if (residual) v += *(const vec *)(residual + at);
            *(vec *)(y + at) = v;
        } else
            for (int64_t i = 0; i < width; i++) y[at + i] = v[i] + (residual ? residual[at + i] : 0);
    }
}

static int64_t panel_count(const Linear *l) { return (l->out + PANEL - 1) / PANEL; }

static int64_t panel_bytes(const Linear *l) {
    return l->type == INT8 ? (l->in + 3) / 4 * 4 * PANEL : l->in * PANEL * weight_size(l->type);
}

/* y = activation(x W + bias) + residual, of x (rows, in); y and residual (rows, ldy) may be the same. */
typedef struct {
    const Linear *linear;
    const float *x;
    int64_t rows;
    float *y;
    int64_t ldy;
    const float *residual; /* or NULL */
    int64_t activation;
    Integers integers; /* x, for INT8 */
    int64_t piece;     /* panels in a piece of the work */
} Product;

static void convert_row(const void *job, int64_t thread, int64_t r) {
    const Product *o = job;
    (void)thread;
    to_integers(o->x + r * o->linear->in, o->linear->in, &o->integers, r);
}

/* Some neighbouring panels of a product, of all rows. */
static void compute_panels(const Product *o, int64_t p, int64_t count) {
    const Linear *l = o->linear;
    const char *weight = (const char *)l->weight + p * panel_bytes(l);
    for (int64_t r0 = 0, n; r0 < o->rows; r0 += n) {
        n = rows_together(o->rows - r0);
        Sums sums;
        multiply(l, count, n, o->x, &o->integers, r0, weight, sums);
        for (int64_t q = 0; q < count; q++)
            for (int64_t r = 0; r < n; r++)
                finish(l, p + q, sums + (q * n + r) * 2, o->y + (r0 + r) * o->ldy,
                       o->residual ? o->residual + (r0 + r) * o->ldy : NULL, o->activation);
    }
}

static void compute_piece(const void *job, int64_t thread, int64_t piece) {
    const Product *o = job;
    (void)thread;
    int64_t p = piece * o->piece, end = panel_count(o->linear);
    if (end - p > o->piece) end = p + o->piece;
    for (int64_t count; p < end; p += count) {
        for (count = panels_together(o->rows); count > end - p; count /= 2) continue;
        compute_panels(o, p, count);
    }
}

/* Computes a product. integers: room for x as integers. */
static void multiply_out(Crew *crew, Product o, float *integers) {
    int64_t panels = panel_count(o.linear);
    if (o.linear->type == INT8) {
        o.integers = integers_in(integers, o.rows, o.linear->in);
        for_rows(crew, o.rows, convert_row, &o);
    }
    o.piece = panels_together(o.rows);
    while (o.piece > 1 && panels < o.piece * crew->threads) o.piece /= 2; /* something for each thread */
    share_out(crew, (panels + o.piece - 1) / o.piece, compute_piece, &o);
}

/* y = activation(x W + bias) + residual, of all tokens of a pass. */
static void linear(const Context *c, const Linear *l, const float *x, float *y, const float *residual,
                   int64_t activation) {
    multiply_out(c->crew, (Product){l, x, c->pass->tokens, y, l->out, residual, activation}, c->w.integers);
}

/* ---- Norms ------------------------------------------------------------------------------------------------------- */

static float mean_of(const float *x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

/* RMS norm takes the mean for 0. */
static void normalize_row(const Norm *norm, const float *x, float *y, int64_t dim) {
    float mean = norm->bias ? mean_of(x, dim) : 0, squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(squares / dim + (float)norm->eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) y[i] = (x[i] - mean) * scale * norm->weight[i] + (norm->bias ? norm->bias[i] : 0);
}

typedef struct {
    const Norm *norm;
    const float *x;
    float *y; /* may be x */
    int64_t dim;
} Normalization;

static void normalize_one(const void *job, int64_t thread, int64_t r) {
    const Normalization *n = job;
    (void)thread;
    normalize_row(n->norm, n->x + r * n->dim, n->y + r * n->dim, n->dim);
}

/* The norm of x (T, dim), written to y; x itself if there is no norm. */
static const float *normalize(const Context *c, const Norm *norm, const float *x, float *y) {
    if (!norm->weight) return x;
    for_rows(c->crew, c->pass->tokens, normalize_one, &(Normalization){norm, x, y, c->stack->dim});
    return y;
}

/* ---- Attention --------------------------------------------------------------------------------------------------- */

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

/* One head's attention of one query (head_dim) to n positions; bias (n, up to a whole panel) may be NULL. */
static void attend(const Stack *stack, const float *query, const float *keys, const float *values, int64_t capacity,
                   int64_t n, const float *bias, float *scores, float *out) {
    int64_t head_dim = stack->head_dim;
    float scale = (float)stack->score_scale;
    Sums sums;
    for (int64_t t = 0; t < n; t += PANEL) {
        multiply_rows(1, 1, FLOAT32, query, 0, head_dim, keys + t, capacity, 0, sums);
        for (int half = 0; half < 2; half++) {
            vec score = sums[half] * scale;
            if (bias) score += *(const vec *)(bias + t + half * LANES);
            *(vec *)(scores + t + half * LANES) = score;
        }
    }
    softmax(scores, n);
    for (int64_t d = 0; d < head_dim; d += PANEL) {
        multiply_rows(1, 1, FLOAT32, scores, 0, n, values + d, head_dim, 0, sums);
        int64_t width = head_dim - d < PANEL ? head_dim - d : PANEL;
        memcpy(out + d, sums, width * sizeof(float));
    }
}

/* Writes one head's keys and values of new tokens, found in rows of a product's output.
 *
 * key: (count, ld), the head's key (head_dim) at its start; its value follows after `distance` floats.
 * keys (head_dim, capacity), values (capacity, head_dim): written from position start on. */
static void store_keys(const float *key, int64_t ld, int64_t distance, int64_t count, int64_t start, int64_t head_dim,
                       int64_t capacity, float *keys, float *values) {
    for (int64_t i = 0; i < count; i++, key += ld) {
        for (int64_t d = 0; d < head_dim; d++) keys[d * capacity + start + i] = key[d];
        memcpy(values + (start + i) * head_dim, key + distance, head_dim * sizeof(float));
    }
}

typedef struct {
    const Context *c;
    int64_t layer;
} Attention;

/* Stores the keys and values of one sentence's new tokens in one head, and attends to all that each may see:
 * w.projected to w.attended. */
static void self_attend(const void *job, int64_t thread, int64_t unit) {
    const Attention *a = job;
    const Stack *stack = a->c->stack;
    const State *state = a->c->state;
    const Pass *pass = a->c->pass;
    const Workspace *w = &a->c->w;
    int64_t width = attention_dim(stack), heads = stack->heads, head_dim = stack->head_dim, capacity = state->capacity;
    int64_t sentence = unit / heads, head = unit % heads, offset = first_token(pass, sentence);
    int64_t start = pass->starts[sentence], count = pass->counts[sentence];
    int64_t at = a->layer * state->layer_size + (pass->rows[sentence] * heads + head) * head_dim * capacity;
    float *keys = state->keys + at, *values = state->values + at;
    const float *query = w->projected + offset * 3 * width + head * head_dim;
    const float *bias = state->biases ? state->biases + (2 * head + 1) * state->reach - start : NULL;
    store_keys(query + width, 3 * width, width, count, start, head_dim, capacity, keys, values);
    for (int64_t i = 0; i < count; i++) {
        int64_t seen = start + (stack->causal ? i + 1 : count);
        attend(stack, query + i * 3 * width, keys, values, capacity, seen, bias ? bias - i : NULL,
               w->scores + thread * w->score_room, w->attended + (offset + i) * width + head * head_dim);
    }
}

/* One head's attention of one sentence's new tokens to the source: queries w.projected (T, dim) to w.attended. */
static void source_attend(const void *job, int64_t thread, int64_t unit) {
    const Attention *a = job;
    const Stack *stack = a->c->stack;
    const State *state = a->c->state;
    const Pass *pass = a->c->pass;
    const Workspace *w = &a->c->w;
    int64_t width = attention_dim(stack), heads = stack->heads, head_dim = stack->head_dim;
    int64_t capacity = state->source_capacity;
    int64_t sentence = unit / heads, head = unit % heads, row = pass->rows[sentence];
    int64_t at = ((a->layer * state->sentences + row) * heads + head) * head_dim * capacity;
    const float *keys = state->source_keys + at, *values = state->source_values + at;
    int64_t first = first_token(pass, sentence);
    for (int64_t i = first; i < first + pass->counts[sentence]; i++)
        attend(stack, w->projected + i * width + head * head_dim, keys, values, capacity, state->source_lengths[row],
               NULL, w->scores + thread * w->score_room, w->attended + i * width + head * head_dim);
}

/* Attention of all new tokens in all heads. */
static void attention(const Context *c, Work *attend_unit, int64_t layer) {
    share_out(c->crew, c->pass->sentences * c->stack->heads, attend_unit, &(Attention){c, layer});
}

/* ---- One layer --------------------------------------------------------------------------------------------------- */

/* One row of what fc2 reads, where fc1's output is two factors side by side, the activated one first. */
static void gate_row(const void *job, int64_t thread, int64_t r) {
    const Context *c = job;
    (void)thread;
    int64_t ffn = c->stack->ffn;
    const float *factors = c->w.inner + r * 2 * ffn;
    for (int64_t i = 0; i < ffn; i += LANES) {
        vec v = activate(c->stack->activation, load_some(factors + i, ffn - i));
        store_some(c->w.gated + r * ffn + i, v * load_some(factors + ffn + i, ffn - i), ffn - i);
    }
}

static void feed_forward(const Context *c, const Layer *layer, const float *x, float *y, const float *residual) {
    int64_t gated = c->stack->gated;
    linear(c, &layer->fc1, x, c->w.inner, NULL, gated ? NONE : c->stack->activation);
    if (gated) for_rows(c->crew, c->pass->tokens, gate_row, c);
    linear(c, &layer->fc2, gated ? c->w.gated : c->w.inner, y, residual, NONE);
}

/* Post-norm keeps x as it is before the norm: the sum of a sublayer and its residual is normalized when the next
 * sublayer reads it. */
static void run_layer(const Context *c, int64_t index) {
    const Layer *layer = c->stack->layers + index;
    int64_t pre = c->stack->pre_norm, attends_to_source = c->stack->attends_to_source;
    float *x = c->pass->x, *projected = c->w.projected, *attended = c->w.attended, *normalized = c->w.normalized;

    const float *y = pre ? normalize(c, &layer->self_norm, x, normalized) : x;
    linear(c, &layer->qkv, y, projected, NULL, NONE);
    attention(c, self_attend, index);
    linear(c, &layer->self_out, attended, x, x, NONE);

    if (attends_to_source) {
        y = normalize(c, pre ? &layer->source_norm : &layer->self_norm, x, normalized);
        linear(c, &layer->source_query, y, projected, NULL, NONE);
        attention(c, source_attend, index);
        linear(c, &layer->source_out, attended, x, pre ? x : y, NONE);
    }

    const Norm *before = pre ? &layer->final_norm : attends_to_source ? &layer->source_norm : &layer->self_norm;
    y = normalize(c, before, x, normalized);
    feed_forward(c, layer, y, x, pre ? x : y);
    if (!pre) normalize(c, &layer->final_norm, x, x);
}

/* ---- One pass ---------------------------------------------------------------------------------------------------- */

/* Writes to x what the lowest layer reads of a sentence: embeddings, or the hidden states of the layers below. */
static void embed(const void *job, int64_t thread, int64_t sentence) {
    const Context *c = job;
    const Stack *stack = c->stack;
    const State *state = c->state;
    const Pass *pass = c->pass;
    (void)thread;
    int64_t dim = stack->dim, count = pass->counts[sentence], start = pass->starts[sentence];
    int64_t first = first_token(pass, sentence);
    float *x = pass->x + first * dim;
    if (!pass->token) {
        int64_t at = pass->rows[sentence] * state->capacity + start;
        memcpy(x, state->hidden + at * dim, count * dim * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count; i++, x += dim) {
        int64_t at = start + i, starts = at == 0 && stack->start_row >= 0;
        const float *token = stack->embedding + (starts ? stack->start_row : pass->token[first + i]) * dim;
        const float *position = state->positions ? state->positions + at * dim : NULL;
        for (int64_t d = 0; d < dim; d++)
            x[d] = (float)stack->embed_scale * token[d] + (position ? position[d] : 0);
        if (stack->embed_norm.weight) normalize_row(&stack->embed_norm, x, x, dim);
    }
}

static void keep_hidden(const Stack *stack, const State *state, const Pass *pass) {
    const float *x = pass->x;
    for (int64_t s = 0; s < pass->sentences; s++) {
        int64_t at = pass->rows[s] * state->capacity + pass->starts[s], size = pass->counts[s] * stack->dim;
        memcpy(state->hidden + at * stack->dim, x, size * sizeof(float));
        x += size;
    }
}

/* One of the hidden states to predict from, normalized. */
static void select_hidden(const void *job, int64_t thread, int64_t r) {
    const Context *c = job;
    const Norm *norm = &c->pass->head->norm;
    (void)thread;
    int64_t dim = c->stack->dim;
    const float *from = c->pass->x + c->pass->selected[r] * dim;
    float *to = c->w.selected + r * dim;
    if (norm->weight)
        normalize_row(norm, from, to, dim);
    else
        memcpy(to, from, dim * sizeof(float));
}

/* What a chunk of one prediction's logits adds to its normalizer. */
static void sum_chunk(const void *job, int64_t thread, int64_t piece) {
    const Context *c = job;
    const Pass *pass = c->pass;
    (void)thread;
    int64_t begin = piece % chunk_count(pass) * CHUNK, end = pass->logits_stride;
    if (end - begin > CHUNK) end = begin + CHUNK;
    float *logits = pass->logits + piece / chunk_count(pass) * pass->logits_stride;
    for (int64_t i = pass->head->vocabulary.out; i < end; i++) logits[i] = -INFINITY;
    vec top = broadcast(-INFINITY), sum = {0};
    for (int64_t i = begin; i < end; i += LANES) {
        vec v = *(vec *)(logits + i);
        top = choose(v > top, v, top);
    }
    float max = vec_max(top);
    for (int64_t i = begin; i < end; i += LANES) sum += vec_exp(*(vec *)(logits + i) - max);
    c->w.tops[piece] = max;
    c->w.sums[piece] = vec_sum(sum);
}

/* logsumexp of a prediction's logits. */
static float log_normalizer(const float *tops, const float *sums, int64_t chunks) {
    float max = -INFINITY, total = 0;
    for (int64_t i = 0; i < chunks; i++) max = tops[i] > max ? tops[i] : max;
    for (int64_t i = 0; i < chunks; i++) total += sums[i] * expf(tops[i] - max);
    return max + logf(total);
}

/* The logits after the selected tokens, and their normalizers. */
static void predict(const Context *c) {
    const Pass *pass = c->pass;
    int64_t n = pass->predictions, chunks = chunk_count(pass);
    for_rows(c->crew, n, select_hidden, c);
    multiply_out(c->crew,
                 (Product){&pass->head->vocabulary, c->w.selected, n, pass->logits, pass->logits_stride, NULL, NONE},
                 c->w.integers);
    share_out(c->crew, n * chunks, sum_chunk, c);
    for (int64_t r = 0; r < n; r++)
        pass->log_normalizer[r] = log_normalizer(c->w.tops + r * chunks, c->w.sums + r * chunks, chunks);
}

static void run(const Stack *stack, const State *state, const Pass *pass) {
    Context c = {crew_of(pass->threads), stack, state, pass, workspace(stack, state, pass)};
    share_out(c.crew, pass->sentences, embed, &c);
    for (int64_t index = pass->first; index < pass->end; index++) run_layer(&c, index);
    if (pass->keep) keep_hidden(stack, state, pass);
    for (int64_t index = pass->own_first; index < pass->own_end; index++) run_layer(&c, index);
    normalize(&c, &stack->output_norm, pass->x, pass->x);
    if (pass->predictions) predict(&c);
}

/* Floats that the pass's workspace must have room for, if there is not enough; else 0. */
static int64_t missing_room(const Stack *stack, const State *state, const Pass *pass) {
    int64_t size = workspace(stack, state, pass).size;
    return size > pass->room ? size : 0;
}

/* Runs a pass. Returns 0; or, having done nothing, the floats that the workspace must have room for. */
int64_t bild_run(const Stack *stack, const State *state, const Pass *pass) {
    int64_t missing = missing_room(stack, state, pass);
    if (!missing) run(stack, state, pass);
    return missing;
}

/* ---- The best token ---------------------------------------------------------------------------------------------- */

/* What every prediction must respect, as in decoding/constraints.py. A prediction's position is the number of generated
 * tokens before it: that of the token it is made after, as the start symbol has position 0 and is not generated. */
typedef struct {
    int64_t pad, unk, eos;         /* outputs of the head that predicts; pad is impossible, -1 where it is none */
    int64_t min_len, max_len;      /* below min_len the end symbol is impossible, from max_len on all others are */
    double unk_penalty;            /* nats */
    const int64_t *prefix_lengths; /* (the state's sentences): min_len is not for these first positions; or NULL */
} Constraints;

typedef struct {
    int64_t token; /* an output of the head, until its types say which token that is */
    float lprob;   /* nats; NaN if a logit is */
} Prediction;

static void constrain(const Constraints *c, int64_t row, int64_t position, float *logits, int64_t out) {
    int64_t prefix = c->prefix_lengths ? c->prefix_lengths[row] : 0;
    if (c->pad >= 0) logits[c->pad] = -INFINITY;
    if (c->unk_penalty) logits[c->unk] -= (float)c->unk_penalty;
    if (position >= c->max_len) {
        float end = logits[c->eos];
        for (int64_t i = 0; i < out; i++) logits[i] = -INFINITY;
        logits[c->eos] = end;
    } else if (position < c->min_len && position >= prefix)
        logits[c->eos] = -INFINITY;
}

/* The largest of some numbers, the first one if there are several. */
static int64_t argmax(const float *numbers, int64_t n) {
    vec top = broadcast(-INFINITY);
    ivec where = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load_some(numbers + i, n - i);
        ivec better = v > top, here = (int32_t)i - (ivec){0};
        top = choose(better, v, top);
        where = (better & here) | (~better & where);
    }
    int64_t best = where[0];
    float max = top[0];
    for (int64_t lane = 1; lane < LANES; lane++) {
        int64_t index = where[lane] + lane;
        if (top[lane] > max || (top[lane] == max && index < best)) max = top[lane], best = index;
    }
    return best;
}

/* The best output after a row's token at a position. Leaves of the logits what the constraints allow. */
static Prediction best_token(const Constraints *c, int64_t row, int64_t position, float *logits, int64_t out,
                             float log_normalizer) {
    constrain(c, row, position, logits, out);
    int64_t token = position >= c->max_len ? c->eos : argmax(logits, out);
    return (Prediction){token, logits[token] - log_normalizer};
}

/* ---- Draft ------------------------------------------------------------------------------------------------------- */

/* What ends a draft, and what it consists of. */
typedef struct {
    Constraints constraints;
    double threshold; /* probability; a draft ends with the first token that is less likely */
    int64_t limit;    /* predictions of each sentence, 1 or more */
    int64_t *order;   /* (sentences): scratch: which sentence each one of the pass is */
    int64_t *made;    /* (sentences), out: predictions */
    int64_t *tokens;  /* (sentences, limit), out: the best token of each prediction */
    float *lprobs;    /* (sentences, limit), out: its log-probability */
} Draft;

/* The next token of the s-th sentence of a pass; whether its draft goes on, with the rule of `falls_back` in
 * decoding/policies.py. */
static int64_t draft_token(const Pass *pass, const Draft *draft, int64_t s) {
    int64_t sentence = draft->order[s], step = draft->made[sentence]++, at = sentence * draft->limit + step;
    int64_t position = pass->starts[s] + pass->counts[s] - 1;
    Prediction best = best_token(&draft->constraints, pass->rows[s], position, pass->logits + s * pass->logits_stride,
                                 pass->head->vocabulary.out, pass->log_normalizer[s]);
    draft->tokens[at] = pass->head->types ? pass->head->types[best.token] : best.token;
    draft->lprobs[at] = best.lprob;
    return best.token != draft->constraints.eos && exp(best.lprob) >= draft->threshold &&
           step + 1 < draft->limit;
}

/* Reads the pass's tokens; then, for every sentence, its best token, the best one after that, and so on, until one is
 * the end symbol, less likely than the threshold, not a number, or the last one allowed. That one is not read.
 *
 * The pass predicts after each sentence's last token; it and its arrays are changed. Returns as bild_run. */
int64_t bild_draft(const Stack *stack, const State *state, Pass *pass, const Draft *draft) {
    int64_t missing = missing_room(stack, state, pass);
    if (missing) return missing;
    for (int64_t s = 0; s < pass->sentences; s++) draft->order[s] = s, draft->made[s] = 0;
    while (pass->sentences) {
        run(stack, state, pass);
        int64_t going = 0;
        for (int64_t s = 0; s < pass->sentences; s++) {
            if (!draft_token(pass, draft, s)) continue;
            int64_t sentence = draft->order[s];
            pass->token[going] = draft->tokens[sentence * draft->limit + draft->made[sentence] - 1];
            pass->starts[going] = pass->starts[s] + pass->counts[s];
            pass->rows[going] = pass->rows[s];
            draft->order[going] = sentence;
            going++;
        }
        for (int64_t s = 0; s < going; s++) pass->counts[s] = 1, pass->selected[s] = s;
        pass->sentences = pass->tokens = pass->predictions = going;
    }
    return 0;
}

/* ---- Verify ------------------------------------------------------------------------------------------------------ */

/* A verdict after every token of a pass. */
typedef struct {
    Constraints constraints;
    const int64_t *drafted; /* (T): the token that follows, or -1 where none does */
    int64_t *best;          /* (T), out: the best token */
    float *best_lprobs;     /* (T), out: its log-probability */
    float *drafted_lprobs;  /* (T), out: that of the token that follows; NaN where none does */
} Verification;

/* The pass predicts after every token, among all tokens. Returns as bild_run. */
int64_t bild_verify(const Stack *stack, const State *state, const Pass *pass, const Verification *v) {
    int64_t missing = missing_room(stack, state, pass), i = 0;
    if (missing) return missing;
    run(stack, state, pass);
    for (int64_t s = 0; s < pass->sentences; s++)
        for (int64_t end = i + pass->counts[s], position = pass->starts[s]; i < end; i++, position++) {
            float *logits = pass->logits + i * pass->logits_stride, log_normalizer = pass->log_normalizer[i];
            Prediction best = best_token(&v->constraints, pass->rows[s], position, logits,
                                         pass->head->vocabulary.out, log_normalizer);
            v->best[i] = best.token;
            v->best_lprobs[i] = best.lprob;
            v->drafted_lprobs[i] = v->drafted[i] < 0 ? NAN : logits[v->drafted[i]] - log_normalizer;
        }
    return 0;
}

/* ---- One product ------------------------------------------------------------------------------------------------- */

/* Floats that bild_product needs for so many rows. */
int64_t bild_product_room(const Linear *l, int64_t rows) { return rows * l->out + integer_room(rows, l->in); }

/* y = x W + bias, of x (rows, in); y (rows, out) has the room of bild_product_room. */
void bild_product(const Linear *l, const float *x, int64_t rows, float *y, int64_t threads) {
    multiply_out(crew_of(threads), (Product){l, x, rows, y, l->out, NULL, NONE}, y + rows * l->out);
}

/* ---- The source -------------------------------------------------------------------------------------------------- */

typedef struct {
    const Stack *stack;
    const State *state;
    const float *y; /* (rows, ld): keys and values of all layers */
    int64_t ld;
} Source;

/* Stores one head's keys and values in one layer, of all sentences. */
static void store_source(const void *job, int64_t thread, int64_t unit) {
    const Source *source = job;
    const State *state = source->state;
    (void)thread;
    int64_t width = attention_dim(source->stack), heads = source->stack->heads, head_dim = source->stack->head_dim;
    int64_t capacity = state->source_capacity, layer = unit / heads, head = unit % heads;
    const float *key = source->y + layer * 2 * width + head * head_dim;
    for (int64_t sentence = 0; sentence < state->sentences; sentence++) {
        int64_t at = ((layer * state->sentences + sentence) * heads + head) * head_dim * capacity;
        int64_t length = state->source_lengths[sentence];
        store_keys(key, source->ld, width, length, 0, head_dim, capacity, state->source_keys + at,
                   state->source_values + at);
        key += length * source->ld;
    }
}

/* Keys and values of the source, for all layers, from the encoder's output.
 *
 * both: of all layers, (layer 0 keys, layer 0 values, layer 1 keys, ...).
 * x: (rows, in), the rows of one sentence after those of another. y: scratch, with the room of bild_product_room. */
void bild_source(const Stack *stack, const State *state, const Linear *both, const float *x, float *y,
                 int64_t threads) {
    int64_t rows = 0, layers = both->out / (2 * attention_dim(stack));
    for (int64_t s = 0; s < state->sentences; s++) rows += state->source_lengths[s];
    bild_product(both, x, rows, y, threads);
    share_out(crew_of(threads), layers * stack->heads, store_source, &(Source){stack, state, y, both->out});
}

/* ---- What the Python side asks ----------------------------------------------------------------------------------- */

int64_t bild_panel(void) { return PANEL; }

/* The size of a struct in bytes; 0 if there is none of that name. */
int64_t bild_size(const char *name) {
#define SIZE(STRUCT) \
    if (!strcmp(name, #STRUCT)) return sizeof(STRUCT);
    SIZE(Linear)
    SIZE(Norm)
    SIZE(Layer)
    SIZE(Stack)
    SIZE(Head)
    SIZE(State)
    SIZE(Pass)
    SIZE(Constraints)
    SIZE(Draft)
    SIZE(Verification)
#undef SIZE
    return 0;
}
