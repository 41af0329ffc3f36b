/* Preloaded into a process, lets reads of files under $BAD_READS_UNDER fail now and then.

   One in $BAD_READS_EVERY, drawn from the seed $BAD_READS_SEED and the number of the read, fails
   with EIO; as many return fewer bytes than were asked for, as POSIX allows. Nothing is changed in
   a process that lacks these variables. Mapped memory is not touched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static uint64_t number;

enum fate { WHOLE, SHORT, FAILED };

static enum fate fate_of(int file)
{
    const char *under = getenv("BAD_READS_UNDER"), *every = getenv("BAD_READS_EVERY");
    const char *seed = getenv("BAD_READS_SEED");
    if (!under || !every || !seed)
        return WHOLE;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return WHOLE;
    path[length] = 0;
    if (strncmp(path, under, strlen(under)))
        return WHOLE;
    uint64_t x = strtoull(seed, 0, 10) * 0x9e3779b97f4a7c15u + __sync_add_and_fetch(&number, 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u; /* splitmix64 */
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    uint64_t drawn = x % strtoull(every, 0, 10);
    return drawn == 0 ? FAILED : drawn == 1 ? SHORT : WHOLE;
}

#define READING(name, declared, passed)                                                            \
    ssize_t name declared                                                                          \
    {                                                                                              \
        static ssize_t(*real) declared;                                                            \
        if (!real)                                                                                 \
            *(void **)&real = dlsym(RTLD_NEXT, #name);                                             \
        switch (fate_of(file)) {                                                                   \
        case FAILED:                                                                               \
            errno = EIO;                                                                           \
            return -1;                                                                             \
        case SHORT:                                                                                \
            count = count > 1 ? count / 2 : count;                                                 \
            break;                                                                                 \
        case WHOLE:                                                                                \
            break;                                                                                 \
        }                                                                                          \
        return real passed;                                                                        \
    }

READING(read, (int file, void *to, size_t count), (file, to, count))
READING(pread, (int file, void *to, size_t count, off_t at), (file, to, count, at))
READING(pread64, (int file, void *to, size_t count, off64_t at), (file, to, count, at))
READING(copy_file_range,
        (int file, off64_t *at, int target, off64_t *to, size_t count, unsigned flags),
        (file, at, target, to, count, flags))
