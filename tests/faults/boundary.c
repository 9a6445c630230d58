/* Ends the process with SIGKILL at the n-th call that changes files below a folder, once it is armed.
 *
 * Preloaded, it stands between every library of the process (Python, torch, the Rust of safetensors) and libc. Only calls on
 * paths or descriptors of regular files and folders below `folder` count: open for writing, write, fsync, rename, mkdir,
 * unlink, rmdir. Armed `torn`, only writes count, and the last one lets the first half of its bytes through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
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
static atomic_int torn;

void boundary_arm(const char *below, long at, int half) {
    snprintf(folder, sizeof folder, "%s", below);
    seen = 0;
    torn = half;
    armed = at;
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

static void pass(int counts) {
    if (counts && !torn && due()) kill(getpid(), SIGKILL);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (fd_below(fd) && due()) {
        if (torn) NEXT(write)(fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return NEXT(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    pass(fd_below(fd));
    return NEXT(pwrite)(fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    pass(fd_below(fd));
    return NEXT(pwrite64)(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    pass(fd_below(fd));
    return NEXT(writev)(fd, parts, count);
}

int fsync(int fd) {
    pass(fd_below(fd));
    return NEXT(fsync)(fd);
}

int fdatasync(int fd) {
    pass(fd_below(fd));
    return NEXT(fdatasync)(fd);
}

int rename(const char *from, const char *to) {
    pass(below(from));
    return NEXT(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    pass(below(path));
    return NEXT(mkdir)(path, mode);
}

int unlink(const char *path) {
    pass(below(path));
    return NEXT(unlink)(path);
}

int unlinkat(int directory, const char *path, int flags) {
    pass(at_below(directory, path));
    return NEXT(unlinkat)(directory, path, flags);
}

int rmdir(const char *path) {
    pass(below(path));
    return NEXT(rmdir)(path);
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        mode_t mode = va_arg(rest, mode_t);                                          \
        va_end(rest);                                                                \
        pass((flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(path));                \
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
        pass((flags & (O_WRONLY | O_RDWR | O_CREAT)) && at_below(directory, path));  \
        return NEXT(name)(directory, path, flags, mode);                             \
    }
OPENAT(openat)
OPENAT(openat64)
