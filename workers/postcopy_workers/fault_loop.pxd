# The types of fault_loop.py, and the calls of C behind the names that the stand-in has for Python.
cimport cython

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <time.h>
    #include <unistd.h>

    typedef uint64_t pc_word;
    typedef int (*pc_ioctl)(int, unsigned long, pc_word *);

    /* The function in Python that stands for ioctl(2): the simulated kernel, or one with crash points. */
    static __thread PyObject *pc_python_ioctl;

    static void pc_use_ioctl(PyObject *function)
    {
        pc_python_ioctl = function;
    }

    static int pc_call_kernel(int fd, unsigned long request, pc_word *fields)
    {
        return ioctl(fd, request, fields);
    }

    /* Not 0: an exception is set. */
    static int pc_call_python(int fd, unsigned long request, pc_word *fields)
    {
        PyGILState_STATE state = PyGILState_Ensure();
        int failed = 1;
        PyObject *view = PyMemoryView_FromMemory((char *)fields, ((request >> 16) & 0x3fff), PyBUF_WRITE);
        if (view) {
            PyObject *answer = PyObject_CallFunction(pc_python_ioctl, "ikO", fd, request, view);
            failed = answer == NULL;
            Py_XDECREF(answer);
            Py_DECREF(view);
        }
        PyGILState_Release(state);
        return failed;
    }

    static long long pc_clock(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    static long long pc_read(int fd, pc_word *fields)
    {
        ssize_t length = read(fd, fields, 512); /* BATCH messages */
        if (length >= 0)
            return length;
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    }

    static int pc_bucket(long long ns)
    {
        if (ns < 256)
            return 64;
        if (ns >> 38)
            return 303;
        int bits = 64 - __builtin_clzll((unsigned long long)ns);
        return (bits << 3) + (int)(ns >> (bits - 4)) - 16;
    }

    static void *pc_memory(PyObject *view)
    {
        Py_buffer found;
        if (PyObject_GetBuffer(view, &found, PyBUF_WRITABLE) < 0)
            return NULL;
        void *memory = found.buf;
        PyBuffer_Release(&found); /* ``kept`` holds the view, and the view its memory */
        return memory;
    }
    """
    ctypedef unsigned long long pc_word
    ctypedef int (*pc_ioctl)(int, unsigned long, pc_word *) noexcept nogil
    int pc_call_kernel(int, unsigned long, pc_word *) noexcept nogil
    int pc_call_python(int, unsigned long, pc_word *) noexcept nogil
    void *pc_memory(object) except NULL
    void use_ioctl "pc_use_ioctl" (object)
    long long clock "pc_clock" () noexcept nogil
    long long read "pc_read" (int, pc_word *) noexcept nogil
    cpdef int bucket "pc_bucket" (long long ns) noexcept nogil

cdef inline unsigned char *bytes_of(object view) except NULL:
    return <unsigned char *>pc_memory(view)

cdef inline pc_word *words_of(object view) except NULL:
    return <pc_word *>pc_memory(view)

cdef inline pc_ioctl ioctl_of(object ioctl) except NULL:
    from fcntl import ioctl as kernel

    return pc_call_kernel if ioctl is kernel else pc_call_python

cdef unsigned long UFFDIO_COPY, UFFDIO_CONTINUE, UFFDIO_WAKE
cdef int MESSAGE_BYTES, HELD_UNTIL_NS, PLAIN, MISSING, PLACING, RECEIVED, PLACED_STAGE, WOKEN, STREAMS, REACH
cdef int EVENT_PAGEFAULT, MESSAGE_FIELDS, BATCH, BASE_SHIFT, TIMED, FAULT_MINOR, FAULT_WRITE, TIDY_PAGES
cdef int ANSWERED, NOTHING_READ, BEHIND, UNCOMMON, ELSEWHERE, FAILED, READING

cdef class LocalRegion:
    cdef readonly object region, kept
    cdef long long base, first, end, target, source
    cdef long long expected[8]
    cdef int streams, noted, place_on, resume_on
    cdef bint private, adaptive
    cdef public long long placed
    cdef long long trust_at
    cdef pc_word *copy
    cdef pc_word *copy_buffer
    cdef pc_word *resume
    cdef pc_word *resume_buffer
    cdef pc_word *counters
    cdef pc_word *stages
    cdef pc_word *control
    cdef unsigned char *received
    cdef pc_ioctl ioctl

    cdef void note_time(self, long long taken, int weight) noexcept nogil
    cdef take_streams(self)
    cdef give_streams(self)
    @cython.locals(at=int, first=cython.longlong, nearest=cython.longlong, expected=cython.longlong)
    cdef bint alone(self, long long page) noexcept nogil

cdef class FaultLoop:
    cdef readonly object regions, messages
    cdef readonly LocalRegion current
    cdef public int at, count
    cdef readonly long long begun, pages
    cdef int userfaultfd, failed
    cdef bint once
    cdef object python_ioctl
    cdef pc_word *fields

    @cython.locals(region=LocalRegion, outcome=int)
    cpdef int run(self) except? -1
    @cython.locals(region=LocalRegion)
    cdef bint _choose(self, long long address) except? -1
    @cython.locals(flags=cython.longlong, address=cython.longlong, page=cython.longlong, begun=cython.longlong, at=int,
        count=int, place=int, length=cython.longlong, plain=cython.longlong, weight=int, taken=int)
    cdef int _run(self, LocalRegion region) except? 5 nogil
