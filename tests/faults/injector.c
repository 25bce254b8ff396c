// Injector of faults: a library to preload that counts the C library's file calls below one directory, and makes one of
// them fail, do half of its work, or end the process; or gives the whole directory the ways of a network file system.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL_BEFORE = -1, KILL_AFTER = -2, HALF_THEN_KILL = -3 };                // a positive mode is an error number
enum { NO_EXCHANGE = 1, NO_LOCKS = 2, LOCKS_LIE = 4, NO_RENAME_OVER = 8 };      // of a file system
static atomic_int armed, counted;
static int nth, mode, sticky, reads, ways, list = -1;
static char root[1024];
static __thread int inside;

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

void fault_arm(const char *below, int at, int what, int repeat, int with_reads, int manner, const char *names) {
    strncpy(root, below, sizeof root - 1);
    nth = at, mode = what, sticky = repeat, reads = with_reads, ways = manner, counted = 0;
    list = *names ? (int)open(names, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    armed = 1;
}
void fault_disarm(void) { armed = 0; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}
static int below_root(const char *path) { return path && strstr(path, root) != NULL; }
// The path behind a descriptor, or of a name beside one.
static const char *of_descriptor(int descriptor, char *buffer) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, buffer, 4095);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}
static const char *of_name(int directory, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    if (directory == AT_FDCWD ? !getcwd(buffer, 2000) : !of_descriptor(directory, buffer)) return path;
    strcat(buffer, "/");
    return strncat(buffer, path, 1900);
}
// Counts a call; 1 if it is the one to fail.
static int due(const char *call, const char *path) {
    if (!armed || inside || !below_root(path)) return 0;
    int number = atomic_fetch_add(&counted, 1) + 1;
    if (list >= 0) {
        inside = 1;
        dprintf(list, "%s %s\n", call, path + strlen(root));
        inside = 0;
    }
    if (nth <= 0 || !(number == nth || (sticky && number > nth))) return 0;
    if (mode == KILL_BEFORE) die();
    return 1;
}
#define FAIL(value)                                                                                                    \
    if (hit && mode > 0) {                                                                                             \
        errno = mode;                                                                                                  \
        return value;                                                                                                  \
    }                                                                                                                  \
    if (hit && mode == HALF_THEN_KILL) die();
#define DONE(result)                                                                                                   \
    if (hit && mode == KILL_AFTER) die();                                                                              \
    return result;
#define ON_NAME(call, directory, path) char buffer[4096]; int hit = armed ? due(call, of_name(directory, path, buffer)) : 0;
#define ON_DESCRIPTOR(call, descriptor) char buffer[4096]; int hit = armed ? due(call, of_descriptor(descriptor, buffer)) : 0;

static int refuses(const char *source, int directory, const char *target, unsigned flags) {
    char buffer[4096];
    if (!armed || !below_root(of_name(directory, target, buffer))) return 0;
    if (flags && (ways & NO_EXCHANGE)) return EINVAL;
    return !flags && (ways & NO_RENAME_OVER) && !faccessat(directory, target, F_OK, AT_SYMLINK_NOFOLLOW) ? EEXIST : 0;
}
int renameat2(int from, const char *source, int to, const char *target, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned)
    int refusal = refuses(source, to, target, flags);
    if (refusal) { errno = refusal; return -1; }
    ON_NAME("rename", to, target)
    FAIL(-1)
    int result = real(from, source, to, target, flags);
    DONE(result)
}
int renameat(int from, const char *source, int to, const char *target) {
    REAL(int, renameat, int, const char *, int, const char *)
    int refusal = refuses(source, to, target, 0);
    if (refusal) { errno = refusal; return -1; }
    ON_NAME("rename", to, target)
    FAIL(-1)
    int result = real(from, source, to, target);
    DONE(result)
}
int rename(const char *source, const char *target) { return renameat(AT_FDCWD, source, AT_FDCWD, target); }

static int open_at(int directory, const char *path, int flags, mode_t rights) {
    REAL(int, openat64, int, const char *, int, ...)
    char buffer[4096];
    int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0, hit = 0;
    if (armed && (writes || reads)) hit = due(writes ? "create" : "open", of_name(directory, path, buffer));
    FAIL(-1)
    int result = ((int (*)(int, const char *, int, mode_t))real)(directory, path, flags, rights);
    DONE(result)
}
#define RIGHTS                                                                                                         \
    mode_t rights = 0;                                                                                                 \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                                             \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        rights = va_arg(more, mode_t);                                                                                 \
        va_end(more);                                                                                                  \
    }
int open(const char *path, int flags, ...) { RIGHTS return open_at(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS return open_at(AT_FDCWD, path, flags | O_LARGEFILE, rights); }
int openat(int d, const char *path, int flags, ...) { RIGHTS return open_at(d, path, flags, rights); }
int openat64(int d, const char *path, int flags, ...) { RIGHTS return open_at(d, path, flags | O_LARGEFILE, rights); }

ssize_t write(int descriptor, const void *data, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t)
    ON_DESCRIPTOR("write", descriptor)
    if (hit && mode == HALF_THEN_KILL) real(descriptor, data, count / 2);
    FAIL(-1)
    ssize_t result = real(descriptor, data, count);
    DONE(result)
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int)
    ON_DESCRIPTOR("write", descriptor)
    if (hit && mode == HALF_THEN_KILL) real(descriptor, parts, count > 1 ? count / 2 : 1);
    FAIL(-1)
    ssize_t result = real(descriptor, parts, count);
    DONE(result)
}
ssize_t pwrite64(int descriptor, const void *data, size_t count, off64_t start) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)
    ON_DESCRIPTOR("write", descriptor)
    if (hit && mode == HALF_THEN_KILL) real(descriptor, data, count / 2, start);
    FAIL(-1)
    ssize_t result = real(descriptor, data, count, start);
    DONE(result)
}
ssize_t pwrite(int descriptor, const void *data, size_t count, off_t start) { return pwrite64(descriptor, data, count, start); }
ssize_t read(int descriptor, void *data, size_t count) {
    REAL(ssize_t, read, int, void *, size_t)
    char buffer[4096];
    int hit = armed && reads ? due("read", of_descriptor(descriptor, buffer)) : 0;
    FAIL(-1)
    return real(descriptor, data, count);
}
ssize_t pread64(int descriptor, void *data, size_t count, off64_t start) {
    REAL(ssize_t, pread64, int, void *, size_t, off64_t)
    char buffer[4096];
    int hit = armed && reads ? due("read", of_descriptor(descriptor, buffer)) : 0;
    FAIL(-1)
    return real(descriptor, data, count, start);
}
ssize_t pread(int descriptor, void *data, size_t count, off_t start) { return pread64(descriptor, data, count, start); }

int fsync(int descriptor) {
    REAL(int, fsync, int)
    ON_DESCRIPTOR("fsync", descriptor)
    FAIL(-1)
    int result = real(descriptor);
    DONE(result)
}
int ftruncate64(int descriptor, off64_t length) {
    REAL(int, ftruncate64, int, off64_t)
    ON_DESCRIPTOR("ftruncate", descriptor)
    FAIL(-1)
    int result = real(descriptor, length);
    DONE(result)
}
int ftruncate(int descriptor, off_t length) { return ftruncate64(descriptor, length); }
int flock(int descriptor, int operation) {
    REAL(int, flock, int, int)
    char path[4096];
    if (armed && (ways & (NO_LOCKS | LOCKS_LIE)) && below_root(of_descriptor(descriptor, path))) {
        errno = ENOLCK;
        return ways & NO_LOCKS ? -1 : 0;
    }
    ON_DESCRIPTOR("flock", descriptor)
    FAIL(-1)
    int result = real(descriptor, operation);
    DONE(result)
}
int mkdir(const char *path, mode_t rights) {
    REAL(int, mkdir, const char *, mode_t)
    ON_NAME("mkdir", AT_FDCWD, path)
    FAIL(-1)
    int result = real(path, rights);
    DONE(result)
}
int unlinkat(int directory, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int)
    ON_NAME("unlink", directory, path)
    FAIL(-1)
    int result = real(directory, path, flags);
    DONE(result)
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int chmod(const char *path, mode_t rights) {
    REAL(int, chmod, const char *, mode_t)
    ON_NAME("chmod", AT_FDCWD, path)
    FAIL(-1)
    int result = real(path, rights);
    DONE(result)
}
