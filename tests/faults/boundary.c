/* Ends the process with SIGKILL at the n-th call that changes files below a path, once it is armed, or lets that call and all
 * that follow fail with an error of the disk.
 *
 * Preloaded, it stands between every library of the process (Python, torch, the Rust of safetensors) and libc. Only calls on
 * paths or descriptors of regular files and folders below `folder` count: open for writing, write, fsync, rename, mkdir,
 * unlink, rmdir. Armed `torn`, only writes count, and the last one lets the first half of its bytes through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_long armed, seen;
static atomic_int torn, failing;

void boundary_arm(const char *below, long at, int half) {
    snprintf(folder, sizeof folder, "%s", below);
    seen = 0;
    torn = half;
    failing = 0;
    armed = at;
}

/* From the n-th call on every one fails with `number` (errno); 0 calls: none does any more. */
void boundary_fail(const char *below, long at, int number) {
    boundary_arm(below, at, 0);
    failing = number;
}

long boundary_seen(void) { return seen; }

static int below(const char *path) { return armed && path && strncmp(path, folder, strlen(folder)) == 0; }

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

static int at_below(int directory, const char *path) {
    return path && path[0] == '/' ? below(path) : directory == AT_FDCWD ? 0 : fd_below(directory);
}

/* Whether this is the call to die at. */
static int due(void) { return atomic_fetch_add(&seen, 1) + 1 == armed; }

/* Whether a call must fail: errno is set then. It may not return. */
static int refused(int counts) {
    if (!counts || torn) return 0;
    if (failing) {
        if (atomic_fetch_add(&seen, 1) + 1 < armed) return 0;
        errno = failing;
        return 1;
    }
    if (due()) kill(getpid(), SIGKILL);
    return 0;
}

/* What takes something away works also on a full disk. */
static int removing(int counts) { return counts && failing != ENOSPC && failing != EDQUOT; }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    int counts = fd_below(fd);
    if (counts && torn && due()) {
        NEXT(write)(fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    if (refused(counts)) return -1;
    return NEXT(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    if (refused(fd_below(fd))) return -1;
    return NEXT(pwrite)(fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (refused(fd_below(fd))) return -1;
    return NEXT(pwrite64)(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (refused(fd_below(fd))) return -1;
    return NEXT(writev)(fd, parts, count);
}

int fsync(int fd) {
    if (refused(fd_below(fd))) return -1;
    return NEXT(fsync)(fd);
}

int fdatasync(int fd) {
    if (refused(fd_below(fd))) return -1;
    return NEXT(fdatasync)(fd);
}

int rename(const char *from, const char *to) {
    if (refused(below(from))) return -1;
    return NEXT(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    if (refused(below(path))) return -1;
    return NEXT(mkdir)(path, mode);
}

int unlink(const char *path) {
    if (refused(removing(below(path)))) return -1;
    return NEXT(unlink)(path);
}

int unlinkat(int directory, const char *path, int flags) {
    if (refused(removing(at_below(directory, path)))) return -1;
    return NEXT(unlinkat)(directory, path, flags);
}

int rmdir(const char *path) {
    if (refused(removing(below(path)))) return -1;
    return NEXT(rmdir)(path);
}

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        mode_t mode = va_arg(rest, mode_t);                                          \
        va_end(rest);                                                                \
        if (refused(CHANGES(flags) && below(path))) return -1;                       \
        return NEXT(name)(path, flags, mode);                                        \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
    int name(int directory, const char *path, int flags, ...) {                      \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        mode_t mode = va_arg(rest, mode_t);                                          \
        va_end(rest);                                                                \
        if (refused(CHANGES(flags) && at_below(directory, path))) return -1;         \
        return NEXT(name)(directory, path, flags, mode);                             \
    }
OPENAT(openat)
OPENAT(openat64)
