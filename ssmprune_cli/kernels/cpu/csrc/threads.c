#include "threads.h"
#include <pthread.h>

static int forked;

static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(0, 0, after_fork); }

/* A forked process has only the thread that forked, while GNU's OpenMP still counts on those that its parent had. */
int team(int64_t wanted) { return forked || wanted < 1 ? 1 : (int)wanted; }

/* Whether there is a team at all. */
int has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
