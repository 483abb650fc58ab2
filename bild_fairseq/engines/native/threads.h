/* The threads that work on one call: which one this is, its share of the work, and a barrier.
 *
 * OpenMP starts the threads. Only team_member asks it anything; everything else looks at the Team that it is given, so
 * several callers can run at the same time, each with a team of its own. */
#ifndef BILD_THREADS_H
#define BILD_THREADS_H

#include <omp.h>
#include <stdint.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define SPINS 2000 /* how often a thread looks at a barrier before it gives up its core: some 50 microseconds */

/* There are some ten barriers a layer. OpenMP's own spins for milliseconds, which brings decoding to a halt where other
 * programs keep the cores busy: the thread that all wait for gets no core before a time slice ends. Here a thread that
 * has waited for long sleeps. */
typedef struct {
    _Alignas(64) int32_t arrived;
    _Alignas(64) int32_t phase; /* how often all have arrived */
    int32_t sleeping;
} Barrier;

typedef struct {
    int64_t thread, threads; /* this one, counted from 0, and how many there are */
    Barrier *barrier;        /* of all of them */
} Team;

typedef struct {
    int64_t from, to; /* from <= i < to */
} Range;

/* To be called inside a parallel region. OpenMP may give fewer threads than were asked for. */
static inline Team team_member(Barrier *barrier) {
    return (Team){omp_get_thread_num(), omp_get_num_threads(), barrier};
}

/* This thread's part of some units of work. */
static inline Range share(const Team *team, int64_t units) {
    return (Range){units * team->thread / team->threads, units * (team->thread + 1) / team->threads};
}

static inline void sleep_until_change(int32_t *value, int32_t old) {
#if defined(__linux__)
    while (__atomic_load_n(value, __ATOMIC_SEQ_CST) == old) syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, NULL);
#else
    while (__atomic_load_n(value, __ATOMIC_SEQ_CST) == old) sched_yield();
#endif
}

static inline void wake_all(int32_t *value) {
#if defined(__linux__)
    syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX);
#else
    (void)value;
#endif
}

/* Returns when every thread of the team has called it. */
static void wait_for_all(const Team *team) {
    Barrier *b = team->barrier;
    int32_t phase = __atomic_load_n(&b->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == team->threads) {
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

#endif
