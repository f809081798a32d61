/* A client of postcopy in C, written from protocol/README.md alone and without a msgpack library.
 *
 *     client SOCKET BLOCK MODE
 *
 * attaches BLOCK (MODE: private or shared) through the door at SOCKET, reads every byte of it and prints the FNV-1a
 * hash (64 bits, hexadecimal) and the number of bytes. Status: 0 done, 1 failed, 2 usage.
 *
 *     cc -O2 -Wall -Wextra -Werror -o client client.c
 *
 * The numbers of rules in comments are those of the chapter "What a client must do with its memory".
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { VERSION = 1, PACKET = 65536, DESCRIPTORS = 64, TEXT = 4096, PATIENCE_SECONDS = 60 };

enum tag {
    HELLO = 1, OFFER_USERFAULTFD, OPEN_BLOCK, MAPPED, UNMAP, GOODBYE,
    WELCOME = 20, USERFAULTFD_ACCEPTED, BLOCK_OPENED, ATTACHED, UNMAPPED, REFUSED, ENDING, RELEASED,
};

#define USERFAULTFD_IOC_NEW 0xAA00

static void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("client: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* --- out: msgpack of what a client says ------------------------------------------------------------------------- */

struct message {
    unsigned char bytes[PACKET];
    size_t length;
};

static void put(struct message *to, const void *bytes, size_t length)
{
    if (length > sizeof to->bytes - to->length)
        die("a message is too long");
    memcpy(to->bytes + to->length, bytes, length);
    to->length += length;
}

static void put_big_endian(struct message *to, unsigned char format, uint64_t value, unsigned width)
{
    put(to, &format, 1);
    while (width--) {
        unsigned char byte = (unsigned char)(value >> (8 * width));
        put(to, &byte, 1);
    }
}

static void put_uint(struct message *to, uint64_t value)
{
    if (value < 0x80) {
        unsigned char byte = (unsigned char)value;
        put(to, &byte, 1);
    } else {
        put_big_endian(to, 0xcf, value, 8); /* a writer may use any format */
    }
}

static void put_str(struct message *to, const char *text)
{
    size_t length = strlen(text);

    if (length > TEXT)
        die("a text is too long");
    put_big_endian(to, 0xda, length, 2);
    put(to, text, length);
}

static void begin(struct message *to, enum tag tag, unsigned fields)
{
    unsigned char head = (unsigned char)(0x90 | (fields + 2));

    to->length = 0;
    put(to, &head, 1);
    put_uint(to, VERSION);
    put_uint(to, tag);
}

static void say(int door, const struct message *what, int descriptor)
{
    union { char bytes[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
    struct iovec piece = {(void *)what->bytes, what->length};
    struct msghdr packet = {.msg_iov = &piece, .msg_iovlen = 1};

    if (descriptor >= 0) {
        memset(&control, 0, sizeof control);
        packet.msg_control = control.bytes;
        packet.msg_controllen = sizeof control.bytes;
        struct cmsghdr *head = CMSG_FIRSTHDR(&packet);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(head), &descriptor, sizeof(int));
    }
    if (sendmsg(door, &packet, MSG_NOSIGNAL) < 0)
        die("cannot speak to the supervisor: %s", strerror(errno));
}

/* --- in: msgpack of what a supervisor says ---------------------------------------------------------------------- */

struct answer {
    unsigned char bytes[PACKET];
    size_t length, at;
    unsigned fields; /* those not read yet */
    enum tag tag;
    int descriptors[DESCRIPTORS];
    unsigned count;
};

static uint64_t take(struct answer *from, unsigned width)
{
    uint64_t value = 0;

    if (width > from->length - from->at)
        die("the supervisor sent a message that is cut off");
    while (width--)
        value = value << 8 | from->bytes[from->at++];
    return value;
}

static uint64_t get_uint(struct answer *from)
{
    unsigned format = (unsigned)take(from, 1);

    if (format < 0x80)
        return format;
    if (format >= 0xcc && format <= 0xcf)
        return take(from, 1u << (format - 0xcc));
    if (format >= 0xd0 && format <= 0xd3) { /* signed formats may carry what is not negative */
        unsigned width = 1u << (format - 0xd0);
        uint64_t value = take(from, width);
        if (!(value >> (8 * width - 1)))
            return value;
    }
    die("the supervisor sent something else where an unsigned integer belongs (%#x)", format);
}

static void get_str(struct answer *from, char text[TEXT + 1])
{
    unsigned format = (unsigned)take(from, 1);
    uint64_t length = 0;

    if (format >= 0xa0 && format <= 0xbf)
        length = format & 0x1f;
    else if (format >= 0xd9 && format <= 0xdb)
        length = take(from, 1u << (format - 0xd9));
    else
        die("the supervisor sent something else where a text belongs (%#x)", format);
    if (length > TEXT || length > from->length - from->at)
        die("the supervisor sent a text that is too long");
    memcpy(text, from->bytes + from->at, length);
    text[length] = '\0';
    from->at += length;
}

static void get_head(struct answer *from)
{
    unsigned format = (unsigned)take(from, 1);
    uint64_t items = 0, version;

    if (format >= 0x90 && format <= 0x9f)
        items = format & 0x0f;
    else if (format == 0xdc || format == 0xdd)
        items = take(from, format == 0xdc ? 2 : 4);
    if (items < 1)
        die("the supervisor sent something that is no message");
    version = get_uint(from);
    if (version != VERSION)
        die("the supervisor speaks version %" PRIu64 " of the protocol, this client version %d", version, VERSION);
    if (items < 2)
        die("the supervisor sent a message without a tag");
    from->tag = (enum tag)get_uint(from);
    from->fields = (unsigned)(items - 2);
}

static void listen_once(int door, struct answer *to)
{
    union { char bytes[CMSG_SPACE(DESCRIPTORS * sizeof(int))]; struct cmsghdr align; } control;
    struct iovec piece = {to->bytes, sizeof to->bytes};
    struct msghdr packet = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t length = recvmsg(door, &packet, MSG_CMSG_CLOEXEC);

    if (length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        die("the supervisor did not answer within %d s", PATIENCE_SECONDS);
    if (length < 0)
        die("cannot hear the supervisor: %s", strerror(errno));
    if (length == 0)
        die("the supervisor closed the connection");
    if (packet.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        die("the supervisor sent too much");
    to->length = (size_t)length;
    to->at = 0;
    to->count = 0;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&packet); head; head = CMSG_NXTHDR(&packet, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        to->count = (unsigned)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        if (to->count > DESCRIPTORS)
            die("the supervisor sent too many descriptors");
        memcpy(to->descriptors, CMSG_DATA(head), to->count * sizeof(int));
    }
    get_head(to);
}

static void expect_shape(const struct answer *answer, unsigned fields, unsigned fewest, unsigned most)
{
    if (answer->fields != fields)
        die("the supervisor sent message %d with %u fields, not %u", answer->tag, answer->fields, fields);
    if (answer->count < fewest || answer->count > most)
        die("the supervisor sent message %d with %u descriptors", answer->tag, answer->count);
}

static void expect_end(const struct answer *answer)
{
    if (answer->at != answer->length)
        die("the supervisor sent bytes behind message %d", answer->tag);
}

/* The answer to a question. What the supervisor says unasked is passed over: a block that is released needs nothing. */
static void hear(int door, enum tag wanted, struct answer *answer)
{
    char code[TEXT + 1], reason[TEXT + 1];

    for (;;) {
        listen_once(door, answer);
        if (answer->tag == wanted)
            return;
        switch (answer->tag) {
        case RELEASED:
            expect_shape(answer, 1, 0, 0);
            get_uint(answer);
            expect_end(answer);
            break;
        case ENDING:
            expect_shape(answer, 1, 0, 0);
            get_str(answer, reason);
            die("the supervisor ends: %s", reason);
        case REFUSED:
            expect_shape(answer, 2, 0, 0);
            get_str(answer, code);
            get_str(answer, reason);
            die("refused (%s): %s", code, reason);
        default:
            die("the supervisor sent message %d instead of %d", answer->tag, wanted);
        }
    }
}

/* --- the conversation ------------------------------------------------------------------------------------------- */

struct block {
    uint64_t number, size, page_size, pages;
    int memory;
};

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    int door = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        die("%s is too long for a socket", path);
    strcpy(address.sun_path, path);
    if (door < 0 || setsockopt(door, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
        connect(door, (struct sockaddr *)&address, sizeof address))
        die("cannot connect to %s: %s", path, strerror(errno));
    return door;
}

/* Steps 1 and 2; rules 1, 2 and 3. Gives the copy to be kept. */
static int introduce(int door, struct message *question, struct answer *answer)
{
    int userfaultfd;

    begin(question, HELLO, 2);
    put_str(question, "c_client");
    put_str(question, "native");
    say(door, question, -1);
    hear(door, WELCOME, answer);
    expect_shape(answer, 1, 0, 1);
    get_uint(answer);
    expect_end(answer);
    if (answer->count) {
        userfaultfd = ioctl(answer->descriptors[0], USERFAULTFD_IOC_NEW, O_CLOEXEC);
        close(answer->descriptors[0]);
    } else {
        userfaultfd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    }
    if (userfaultfd < 0)
        die("cannot make a userfaultfd: %s", strerror(errno));
    begin(question, OFFER_USERFAULTFD, 0);
    say(door, question, userfaultfd);
    hear(door, USERFAULTFD_ACCEPTED, answer);
    expect_shape(answer, 0, 0, 0);
    expect_end(answer);
    return userfaultfd;
}

/* Step 3. */
static struct block open_block(int door, const char *wanted, const char *mode, struct message *question,
                               struct answer *answer)
{
    struct block block;
    char name[TEXT + 1];

    begin(question, OPEN_BLOCK, 2);
    put_str(question, wanted);
    put_str(question, mode);
    say(door, question, -1);
    hear(door, BLOCK_OPENED, answer);
    expect_shape(answer, 5, 2, 2);
    block.number = get_uint(answer);
    get_str(answer, name);
    block.size = get_uint(answer);
    block.page_size = get_uint(answer);
    block.pages = get_uint(answer);
    expect_end(answer);
    if (strcmp(name, wanted) || (block.page_size != 4096 && block.page_size != 2097152) || !block.size ||
        block.size > UINT64_MAX / 2 || block.pages != (block.size - 1) / block.page_size + 1)
        die("the supervisor described block %s in a way that cannot be", wanted);
    block.memory = answer->descriptors[0];
    close(answer->descriptors[1]); /* the received map: not needed to read a block */
    return block;
}

/* Rules 4 to 6: mapped without access, out of reach of forks, and nothing left by which it could be mapped again. */
static unsigned char *map_untouched(const struct block *block, int shared)
{
    size_t length = block->pages * block->page_size;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE;
    void *memory = mmap(NULL, length, PROT_NONE, flags, block->memory, 0);

    if (memory == MAP_FAILED)
        die("cannot map %zu bytes: %s", length, strerror(errno));
    if (madvise(memory, length, MADV_DONTFORK))
        die("MADV_DONTFORK: %s", strerror(errno));
    if (block->page_size == 4096)
        (void)madvise(memory, length, MADV_NOHUGEPAGE);
    close(block->memory);
    return memory;
}

/* Attached and Unmapped must be about what was asked. */
static void hear_about(int door, enum tag wanted, uint64_t block, uint64_t address, struct answer *answer)
{
    hear(door, wanted, answer);
    expect_shape(answer, 2, 0, 0);
    if (get_uint(answer) != block || get_uint(answer) != address)
        die("the supervisor answered about another region");
    expect_end(answer);
}

static uint64_t fnv1a(const unsigned char *bytes, uint64_t count)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);

    for (uint64_t at = 0; at < count; at++)
        hash = (hash ^ bytes[at]) * UINT64_C(0x100000001b3);
    return hash;
}

int main(int count, char **words)
{
    static struct message question;
    static struct answer answer;

    if (count != 4 || (strcmp(words[3], "private") && strcmp(words[3], "shared"))) {
        fputs("usage: client SOCKET BLOCK private|shared\n", stderr);
        return 2;
    }
    int door = connect_to(words[1]);
    int userfaultfd = introduce(door, &question, &answer);
    struct block block = open_block(door, words[2], words[3], &question, &answer);
    unsigned char *memory = map_untouched(&block, !strcmp(words[3], "shared"));
    uint64_t address = (uint64_t)(uintptr_t)memory, length = block.pages * block.page_size;

    begin(&question, MAPPED, 4);
    put_uint(&question, block.number);
    put_uint(&question, address);
    put_uint(&question, length);
    put_uint(&question, 0);
    say(door, &question, -1);
    hear_about(door, ATTACHED, block.number, address, &answer); /* rule 7 */
    if (mprotect(memory, length, PROT_READ | PROT_WRITE))
        die("mprotect: %s", strerror(errno));

    printf("%016" PRIx64 " %" PRIu64 "\n", fnv1a(memory, block.size), block.size);
    if (fflush(stdout))
        die("cannot write: %s", strerror(errno));

    begin(&question, UNMAP, 2); /* rule 10 */
    put_uint(&question, block.number);
    put_uint(&question, address);
    say(door, &question, -1);
    hear_about(door, UNMAPPED, block.number, address, &answer);
    munmap(memory, length);

    begin(&question, GOODBYE, 0); /* rule 11 */
    say(door, &question, -1);
    close(door);
    close(userfaultfd);
    return 0;
}
