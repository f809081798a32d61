/* The chain: the least that a remote fault can cost in C, when four processes stand in its way as they do with us.
 *
 *     chain USERFAULTFD FILE ADDRESS LENGTH MEMORY
 *
 * client -> worker (this process) -> supervisor -> source -> supervisor -> worker -> client, over raw SEQPACKET sockets.
 * The worker reads one message of the client's userfaultfd and asks; the source answers with the page out of a mapping
 * of the file; the supervisor places it by UFFDIO_COPY through a registered mapping of its own of the block MEMORY;
 * the worker lets the client run by UFFDIO_CONTINUE. One fault at a time, everybody blocks: no poll, no second client,
 * no duplicates, no statistics, no background. What our path adds to this is what the ratios of the benchmark show.
 * All of them end with the client.
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
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define USERFAULTFD_IOC_NEW 0xAA00UL
#define UFFDIO_API 0xC018AA3FUL
#define UFFDIO_REGISTER 0xC020AA00UL
#define UFFDIO_WAKE 0x8010AA02UL
#define UFFDIO_COPY 0xC028AA03UL
#define UFFDIO_CONTINUE 0xC020AA07UL
#define REGISTER_MISSING 1
#define EVENT_PAGEFAULT 0x12
#define PAGE 4096UL

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t hear(int from)
{
	uint64_t offset;
	ssize_t n = recv(from, &offset, sizeof offset, 0);
	if (n == 0)
		exit(0);
	if (n != sizeof offset)
		die("recv");
	return offset;
}

static void say(int to, uint64_t offset)
{
	if (send(to, &offset, sizeof offset, MSG_NOSIGNAL) != sizeof offset)
		die("send");
}

static void be_source(int supervisor, const char *path, uint64_t length)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		die(path);
	uint8_t *bytes = mmap(NULL, length, PROT_READ, MAP_SHARED, file, 0);
	if (bytes == MAP_FAILED)
		die("mmap");
	for (;;) {
		uint64_t offset = hear(supervisor);
		struct iovec parts[2] = {{&offset, sizeof offset}, {bytes + offset, PAGE}};
		if (writev(supervisor, parts, 2) != (ssize_t)(sizeof offset + PAGE))
			die("writev");
	}
}

static void be_supervisor(int worker, int source, int memory, uint64_t length)
{
	static uint8_t page[PAGE] __attribute__((aligned(4096)));
	uint64_t api[3] = {0xAA, 0, 0};
	uint8_t *block = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory, 0);
	if (block == MAP_FAILED)
		die("mmap");
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int ufd = device < 0 ? (int)syscall(SYS_userfaultfd, O_CLOEXEC) : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
	uint64_t region[4] = {(uint64_t)(uintptr_t)block, length, REGISTER_MISSING, 0};
	if (ufd < 0 || ioctl(ufd, UFFDIO_API, api) < 0 || ioctl(ufd, UFFDIO_REGISTER, region) < 0)
		die("userfaultfd");
	say(worker, 0); /* ready */
	for (;;) {
		uint64_t offset = hear(worker);
		say(source, offset);
		struct iovec parts[2] = {{&offset, sizeof offset}, {page, PAGE}};
		if (readv(source, parts, 2) != (ssize_t)(sizeof offset + PAGE))
			die("readv");
		uint64_t copy[5] = {(uint64_t)(uintptr_t)block + offset, (uint64_t)(uintptr_t)page, PAGE, 0, 0};
		if (ioctl(ufd, UFFDIO_COPY, copy) < 0 && errno != EEXIST)
			die("UFFDIO_COPY");
		say(worker, offset);
	}
}

static void be_worker(int client, int supervisor, uint64_t base)
{
	for (;;) {
		uint64_t message[4]; /* event in the first byte, flags, address, thread */
		ssize_t n = read(client, message, sizeof message);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n != sizeof message || (message[0] & 0xff) != EVENT_PAGEFAULT)
			die("read");
		say(supervisor, (message[2] & ~(PAGE - 1)) - base);
		uint64_t address = base + hear(supervisor);
		uint64_t range[4] = {address, PAGE, 0, 0};
		if (ioctl(client, UFFDIO_CONTINUE, range) == 0)
			continue;
		if (ioctl(client, UFFDIO_WAKE, range) < 0)
			die("UFFDIO_WAKE");
	}
}

/* A child with one end of a new socket pair; 0 in the child, whose parent's death is its own. */
static pid_t child(int ends[2])
{
	pid_t parent = getpid();
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		die("socketpair");
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	close(ends[pid == 0 ? 0 : 1]);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			exit(0);
	}
	return pid;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	int client = atoi(argv[1]), memory = atoi(argv[5]);
	uint64_t base = strtoull(argv[3], NULL, 0), length = strtoull(argv[4], NULL, 0);
	int to_supervisor[2], to_source[2];
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (child(to_supervisor) == 0) {
		close(client);
		if (child(to_source) == 0)
			be_source(to_source[1], argv[2], length);
		be_supervisor(to_supervisor[1], to_source[0], memory, length);
	}
	hear(to_supervisor[0]);
	if (write(1, "ready\n", 6) != 6)
		die("write");
	be_worker(client, to_supervisor[0], base);
}
