/* The floor: the least that a handler of a shared client can do, in C. One process for one client.
 *
 *     floor USERFAULTFD FILE ADDRESS LENGTH MEMORY
 *
 * Blocking read of one message, UFFDIO_COPY of that page straight from a mapping of the file, which wakes the toucher;
 * a page that another handler has placed is only woken. No statistics, no received map, no fault-around, no second
 * client: what our worker adds to this is what the ratios of the benchmarks show. It ends with its parent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define UFFDIO_WAKE 0x8010AA02UL
#define UFFDIO_COPY 0xC028AA03UL
#define EVENT_PAGEFAULT 0x12
#define PAGE 4096UL

static int die(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	if (argc != 6) /* MEMORY, the block's descriptor, is for handlers that place through it */
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
		uint64_t copy[5] = {address, (uint64_t)(uintptr_t)source + (address - base), PAGE, 0, 0};
		if (ioctl(ufd, UFFDIO_COPY, copy) == 0)
			continue;
		uint64_t range[2] = {address, PAGE};
		if (errno != EEXIST || ioctl(ufd, UFFDIO_WAKE, range) < 0)
			return die("UFFDIO_COPY");
	}
}
