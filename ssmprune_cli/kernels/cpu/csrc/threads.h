/* Who shares work: the threads of a team. It may be smaller than was asked for: OMP_THREAD_LIMIT, OMP_DYNAMIC, a region
 * inside of another one, a build without OpenMP. So what a thread takes is asked for here, inside the parallel region. */
#ifndef SSMPRUNE_THREADS_H
#define SSMPRUNE_THREADS_H
#include "vectors.h"

#ifdef _OPENMP /* declared here, as not every compiler that knows OpenMP comes with its header */
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#else
INLINE int omp_get_thread_num(void) { return 0; }
INLINE int omp_get_num_threads(void) { return 1; }
#endif

/* The part of `count` things that share `t` of `shares` takes: from *start to *stop. */
INLINE void share(int64_t count, int64_t t, int64_t shares, int64_t *start, int64_t *stop) {
    *start = count * t / shares, *stop = count * (t + 1) / shares;
}

/* The part of `count` things that the calling thread of a team takes. */
INLINE void own_share(int64_t count, int64_t *start, int64_t *stop) {
    share(count, omp_get_thread_num(), omp_get_num_threads(), start, stop);
}

/* The threads to ask for if the caller wants `wanted`: a team has no more. */
int team(int64_t wanted);
#endif
