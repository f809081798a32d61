/* The floor: the least that a handler of one client can do, in C. One process for one client.
 *
 *     floor [two-calls] USERFAULTFD FILE ADDRESS LENGTH MEMORY
 *
 * Blocking read of one message, UFFDIO_COPY of that page straight from a mapping of the file, which wakes the toucher;
 * a page that another handler has placed is only woken. With two-calls the page is copied through a userfaultfd over
 * this process's own mapping of MEMORY, and UFFDIO_CONTINUE on USERFAULTFD wakes the toucher: what a handler of a
 * private client needs. No statistics, no received map, no fault-around, no second client: what our worker adds to
 * this is what the ratios of the benchmarks show. It ends with its parent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define USERFAULTFD_IOC_NEW 0xAA00UL
#define UFFDIO_API 0xC018AA3FUL
#define UFFDIO_REGISTER 0xC020AA00UL
#define REGISTER_MISSING 1
#define UFFDIO_CONTINUE 0xC020AA07UL
#define DONTWAKE 1
#define UFFDIO_WAKE 0x8010AA02UL
#define UFFDIO_COPY 0xC028AA03UL
#define EVENT_PAGEFAULT 0x12
#define PAGE 4096UL

static int die(const char *what)
{
	perror(what);
	return 1;
}

/* A userfaultfd over a mapping of the block in this process; -1 on failure. */
static int own_userfaultfd(int memory, uint64_t length, uint64_t *address)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0)
		return -1;
	int own = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
	void *mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	if (own < 0 || mapped == MAP_FAILED)
		return -1;
	*address = (uint64_t)(uintptr_t)mapped;
	uint64_t api[3] = {0xAA, 0, 0}, range[4] = {*address, length, REGISTER_MISSING, 0};
	return ioctl(own, UFFDIO_API, api) || ioctl(own, UFFDIO_REGISTER, range) ? -1 : own;
}

int main(int argc, char **argv)
{
	int two_calls = argc > 1 && !strcmp(argv[1], "two-calls");
	argv += two_calls;
	if (argc - two_calls != 6)
		return 2;
	int ufd = atoi(argv[1]);
	uint64_t base = strtoull(argv[3], NULL, 0), length = strtoull(argv[4], NULL, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	int file = open(argv[2], O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return die(argv[2]);
	uint8_t *source = mmap(NULL, length, PROT_READ, MAP_SHARED, file, 0);
	if (source == MAP_FAILED)
		return die("mmap");
	uint64_t own_base = 0;
	int own = two_calls ? own_userfaultfd(atoi(argv[5]), length, &own_base) : -1;
	if (two_calls && own < 0)
		return die("own userfaultfd");
	if (write(1, "ready\n", 6) != 6)
		return die("write");
	for (;;) {
		uint64_t message[4]; /* event in the first byte, flags, address, thread */
		ssize_t n = read(ufd, message, sizeof message);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n != sizeof message)
			return die("read");
		if ((message[0] & 0xff) != EVENT_PAGEFAULT)
			return die("event");
		uint64_t address = message[2] & ~(PAGE - 1);
		uint64_t from = (uint64_t)(uintptr_t)source + (address - base);
		uint64_t copy[5] = {two_calls ? own_base + (address - base) : address, from, PAGE, two_calls ? DONTWAKE : 0, 0};
		uint64_t resume[4] = {address, PAGE, 0, 0};
		if (ioctl(two_calls ? own : ufd, UFFDIO_COPY, copy) == 0 &&
		    (!two_calls || ioctl(ufd, UFFDIO_CONTINUE, resume) == 0))
			continue;
		uint64_t range[2] = {address, PAGE};
		if (errno != EEXIST || ioctl(ufd, UFFDIO_WAKE, range) < 0)
			return die("UFFDIO_COPY");
	}
}
