/* What a client does, in C, so that the time of a touch is the time of the fault and of nothing else.
 *
 * Loaded with ctypes into a Python process (the GIL is released during every call). The same code touches a mapping
 * that our worker serves and one that the C floor (floor.c) serves: only the handler differs between two figures.
 * All times are CLOCK_MONOTONIC nanoseconds; functions answer 0 or a negative errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* From the kernel's ABI, not from a header: distributions' headers lag behind their kernels. */
#define USERFAULTFD_IOC_NEW 0xAA00UL
#define UFFDIO_API 0xC018AA3FUL
#define UFFDIO_REGISTER 0xC020AA00UL
#define REGISTER_MISSING 1

static inline uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Everybody of a crowd starts at the same instant; 0 starts at once. */
static void wait_until(uint64_t start)
{
	struct timespec t = {(time_t)(start / 1000000000u), (long)(start % 1000000000u)};
	if (start)
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
			;
}

/* Touch `count` offsets, one byte each; nanoseconds[i] is the time of touch i, span its beginning and end. */
int touch(const volatile uint8_t *base, const uint64_t *offsets, uint64_t count, uint64_t start, uint64_t *nanoseconds,
	  uint64_t span[2])
{
	wait_until(start);
	span[0] = now();
	for (uint64_t i = 0; i < count; i++) {
		uint64_t before = now();
		(void)base[offsets[i]];
		nanoseconds[i] = now() - before;
	}
	span[1] = now();
	return 0;
}

/* Touch missing pages in an open loop: one every `interval` ns, in the order of `offsets`. A touch that is late because the
 * one before took long is timed from the instant at which it was due, so that a slow answer counts for all whom it would
 * have made wait; one that was waited for is timed from its beginning. Pages that are in the block are passed over: mincore() answers for the block of a shared mapping. Gives the number of touches,
 * which is less than `wanted` only when no missing page was left; touched[i] is the offset of touch i. */
int touch_missing(const volatile uint8_t *base, const uint64_t *offsets, uint64_t count, uint64_t wanted,
		  uint64_t interval, uint64_t *touched, uint64_t *nanoseconds)
{
	uint64_t due = now() + interval, done = 0;
	for (uint64_t i = 0; i < count && done < wanted; i++) {
		unsigned char present;
		uint64_t begun = due;
		if (now() < due) {
			wait_until(due);
			begun = 0;
		}
		if (mincore((void *)(uintptr_t)(base + offsets[i]), 1, &present) < 0)
			return -errno;
		if (present & 1)
			continue;
		begun = begun ? begun : now();
		(void)base[offsets[i]];
		nanoseconds[done] = now() - begun;
		touched[done++] = offsets[i];
		due += interval;
	}
	return (int)done;
}

/* Read every word from the first to the last; answers their sum, so that no compiler leaves the reading out. */
uint64_t read_through(const volatile uint64_t *base, uint64_t length, uint64_t span[2])
{
	uint64_t sum = 0;
	span[0] = now();
	for (uint64_t i = 0; i < length / 8; i++)
		sum += base[i];
	span[1] = now();
	return sum;
}

/* The honest peers of a sequential reading: the warm file mapped, and the warm file copied by read(). Times include
 * what a program would wait for: the mapping or the copying, and then the same reading. */
int read_mapped(const char *path, uint64_t length, uint64_t span[2])
{
	uint64_t inner[2];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	span[0] = now();
	void *base = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED) {
		close(fd);
		return -errno;
	}
	read_through(base, length, inner);
	span[1] = now();
	munmap(base, length);
	close(fd);
	return 0;
}

int read_copied(const char *path, uint64_t length, uint64_t span[2])
{
	uint64_t inner[2], done = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	span[0] = now();
	uint8_t *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (base == MAP_FAILED) {
		close(fd);
		return -errno;
	}
	while (done < length) {
		ssize_t n = read(fd, base + done, length - done);
		if (n <= 0)
			break;
		done += (uint64_t)n;
	}
	read_through((const volatile uint64_t *)base, length, inner);
	span[1] = now();
	munmap(base, length);
	close(fd);
	return done == length ? 0 : -EIO;
}

/* Kill the process behind `pidfd` and touch a missing page: nanoseconds from the signal to the byte. */
int kill_and_touch(int pidfd, const volatile uint8_t *address, uint64_t *nanoseconds)
{
	uint64_t before = now();
	if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) < 0)
		return -errno;
	(void)*address;
	*nanoseconds = now() - before;
	return 0;
}

/* How many of the pages at `offsets` differ from the same pages of `truth`: a fast answer that is wrong is no answer. */
uint64_t wrong_pages(const uint8_t *base, const uint8_t *truth, const uint64_t *offsets, uint64_t count, uint64_t page)
{
	uint64_t wrong = 0;
	for (uint64_t i = 0; i < count; i++)
		wrong += memcmp(base + offsets[i], truth + offsets[i], page) != 0;
	return wrong;
}

/* Be a client of the floor: map the block (private: copy-on-write of a descriptor that cannot write), register it for
 * missing pages, answer the userfaultfd (blocking). */
int become_floor_client(int memory, uint64_t length, int private, uint8_t **base)
{
	uint64_t api[3] = {0xAA, 0, 0};
	int flags = (private ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE;
	if (private) {
		char path[32];
		snprintf(path, sizeof path, "/proc/self/fd/%d", memory);
		memory = open(path, O_RDONLY | O_CLOEXEC);
		if (memory < 0)
			return -errno;
	}
	*base = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, memory, 0);
	if (*base == MAP_FAILED || madvise(*base, length, MADV_DONTFORK) < 0)
		return -errno;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd = device < 0 ? (int)syscall(SYS_userfaultfd, O_CLOEXEC) : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
	if (device >= 0)
		close(device);
	if (fd < 0)
		return -errno;
	uint64_t region[4] = {(uint64_t)(uintptr_t)*base, length, REGISTER_MISSING, 0};
	if (ioctl(fd, UFFDIO_API, api) < 0 || ioctl(fd, UFFDIO_REGISTER, region) < 0)
		return -errno;
	return fd;
}
