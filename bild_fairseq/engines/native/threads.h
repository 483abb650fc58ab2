/* Threads that share the work of one caller.
 *
 * The caller runs a pass from its beginning to its end. Each long step is split into pieces, and share_out returns when
 * all of them are done: helpers take pieces, and so does the caller. Any thread may compute any piece, so the caller
 * waits for nobody but a helper that is in the middle of one. A helper that the system has put aside because other
 * programs keep the cores busy, or that still sleeps, leaves its pieces to the others.
 *
 * Each calling thread has a crew of its own, so several callers can run at the same time. */
#ifndef BILD_THREADS_H
#define BILD_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* A thread that waits looks again and again: what comes next is a few microseconds away. After some 50 microseconds it
 * also offers its core to others. When it has done that for about a millisecond, it sleeps: decoding has a pause. */
#define SPINS 1000
#define YIELDS 2000

/* Computes one piece of a step. thread: which one of the crew does it, the caller being 0. */
typedef void Work(const void *job, int64_t thread, int64_t piece);

/* The pieces of a step that a thread begins with, so that it reads the same weights in every pass: they are in its
 * core's cache if the model is small. It takes them from the first on. Who has none left takes others' from the last. */
typedef struct {
    _Alignas(64) uint64_t untaken; /* first in the low half, end in the high half */
} Share;

typedef struct {
    int64_t threads;  /* with the caller */
    int64_t helpers;  /* that have been started */
    pthread_t *ids;   /* (helpers) */
    pid_t process;    /* a forked one has no helpers */
    Work *work;       /* Work and job are of the step under way. Only who holds one of its pieces may read them: for */
    const void *job;  /* all others the step may be over. */
    _Alignas(64) int32_t step; /* how many steps have begun */
    int32_t waiting;           /* helpers that sleep until the next one begins */
    int32_t dismissed;
    _Alignas(64) int32_t unfinished; /* pieces of the step */
    int32_t caller_waits;            /* asleep until it is 0 */
    Share shares[];                  /* (threads) */
} Crew;

/* ---- Waiting ----------------------------------------------------------------------------------------------------- */

/* Returns when a value may no longer be the old one. sleepers: how many sleep here. */
static void wait_for_change(int32_t *value, int32_t old, int32_t *sleepers) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (__atomic_load_n(value, __ATOMIC_ACQUIRE) != old) return;
        if (i >= SPINS) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
#if defined(__linux__)
    __atomic_add_fetch(sleepers, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, NULL); /* returns at once if the value has changed */
    __atomic_sub_fetch(sleepers, 1, __ATOMIC_SEQ_CST);
#else
    (void)sleepers;
    usleep(100);
#endif
}

/* To be called after a value has changed. */
static void wake(int32_t *value, int32_t *sleepers) {
#if defined(__linux__)
    if (__atomic_load_n(sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX);
#else
    (void)value, (void)sleepers;
#endif
}

/* ---- Pieces ------------------------------------------------------------------------------------------------------ */

static inline uint64_t pieces_between(int64_t first, int64_t end) { return (uint64_t)end << 32 | (uint64_t)first; }

/* A piece that nobody has taken, or -1. */
static int64_t take_piece(Crew *crew, int64_t thread) {
    for (int64_t i = 0; i < crew->threads; i++) {
        uint64_t *untaken = &crew->shares[(thread + i) % crew->threads].untaken;
        uint64_t pieces = __atomic_load_n(untaken, __ATOMIC_RELAXED);
        for (;;) {
            int64_t first = pieces & UINT32_MAX, end = pieces >> 32, own = i == 0;
            if (first >= end) break;
            uint64_t others = own ? pieces_between(first + 1, end) : pieces_between(first, end - 1);
            if (__atomic_compare_exchange_n(untaken, &pieces, others, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
                return own ? first : end - 1;
        }
    }
    return -1;
}

/* Computes pieces until all are taken. They are of one step: the next begins when this thread has said that its pieces
 * are done. */
static void take_part(Crew *crew, int64_t thread) {
    int32_t done = 0;
    for (int64_t piece; (piece = take_piece(crew, thread)) >= 0; done++) crew->work(crew->job, thread, piece);
    if (done && !__atomic_sub_fetch(&crew->unfinished, done, __ATOMIC_SEQ_CST) && thread)
        wake(&crew->unfinished, &crew->caller_waits);
}

/* Computes a step's pieces 0 .. pieces - 1, each by one thread. They must not depend on each other. */
static void share_out(Crew *crew, int64_t pieces, Work *work, const void *job) {
    if (crew->threads == 1 || pieces <= 1) {
        for (int64_t piece = 0; piece < pieces; piece++) work(job, 0, piece);
        return;
    }
    crew->work = work, crew->job = job;
    __atomic_store_n(&crew->unfinished, (int32_t)pieces, __ATOMIC_RELAXED);
    for (int64_t t = 0, n = crew->threads; t < n; t++)
        __atomic_store_n(&crew->shares[t].untaken, pieces_between(pieces * t / n, pieces * (t + 1) / n),
                         __ATOMIC_RELEASE);
    __atomic_add_fetch(&crew->step, 1, __ATOMIC_SEQ_CST);
    wake(&crew->step, &crew->waiting);
    take_part(crew, 0);
    for (int32_t left; (left = __atomic_load_n(&crew->unfinished, __ATOMIC_ACQUIRE));)
        wait_for_change(&crew->unfinished, left, &crew->caller_waits);
}

/* ---- The crew ---------------------------------------------------------------------------------------------------- */

typedef struct {
    Crew *crew;
    int64_t thread;
} Helper;

static void *help(void *argument) {
    Helper me = *(Helper *)argument;
    free(argument);
    for (;;) {
        int32_t step = __atomic_load_n(&me.crew->step, __ATOMIC_ACQUIRE);
        if (__atomic_load_n(&me.crew->dismissed, __ATOMIC_ACQUIRE)) return NULL;
        take_part(me.crew, me.thread);
        wait_for_change(&me.crew->step, step, &me.crew->waiting);
    }
}

/* Starts one more helper, if the system allows it: its pieces are otherwise left to the others. */
static void start_helper(Crew *crew) {
    Helper *helper = malloc(sizeof *helper);
    if (!helper) return;
    *helper = (Helper){crew, crew->helpers + 1};
    if (pthread_create(&crew->ids[crew->helpers], NULL, help, helper))
        free(helper);
    else
        crew->helpers++;
}

static void dismiss(void *argument) {
    Crew *crew = argument;
    if (crew->process == getpid()) {
        __atomic_store_n(&crew->dismissed, 1, __ATOMIC_RELEASE);
        __atomic_add_fetch(&crew->step, 1, __ATOMIC_SEQ_CST);
        wake(&crew->step, &crew->waiting);
        for (int64_t i = 0; i < crew->helpers; i++) pthread_join(crew->ids[i], NULL);
    }
    free(crew->ids);
    free(crew);
}

/* NULL without memory. */
static Crew *hire(int64_t threads) {
    size_t size = sizeof(Crew) + threads * sizeof(Share);
    Crew *crew = aligned_alloc(_Alignof(Crew), size);
    pthread_t *ids = malloc(threads * sizeof *ids);
    if (!crew || !ids) return free(crew), free(ids), NULL;
    memset(crew, 0, size);
    crew->threads = threads, crew->ids = ids, crew->process = getpid();
    sigset_t all, before;
    sigfillset(&all); /* the program's own threads deal with signals */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int64_t i = 1; i < threads; i++) start_helper(crew);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return crew;
}

static pthread_key_t crew_key; /* each caller's crew, which is dismissed when the caller's thread ends */
static pthread_once_t crew_key_made = PTHREAD_ONCE_INIT;

static void make_crew_key(void) { pthread_key_create(&crew_key, dismiss); }

/* The calling thread's crew of so many threads; of one thread if there is no memory for more. */
static Crew *crew_of(int64_t threads) {
    static Crew alone = {.threads = 1};
    if (threads <= 1) return &alone;
    pthread_once(&crew_key_made, make_crew_key);
    Crew *crew = pthread_getspecific(crew_key);
    if (crew && (crew->threads != threads || crew->process != getpid())) {
        dismiss(crew);
        pthread_setspecific(crew_key, crew = NULL);
    }
    if (!crew && (crew = hire(threads))) pthread_setspecific(crew_key, crew);
    return crew ? crew : &alone;
}

#endif
