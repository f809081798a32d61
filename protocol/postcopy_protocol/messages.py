"""All messages except those of the return path, one dataclass each: its meaning, sender, receiver and channel.

Channels (see ``protocol/README.md`` for the bytes):

* **attach socket**: Unix SEQPACKET between a client and the supervisor; descriptors travel beside it (SCM_RIGHTS).
* **router**: ZeroMQ, the supervisor's ROUTER; workers and the command line are its DEALERs.
* **custodian**: Unix SEQPACKET socketpair between supervisor and custodian, with descriptors.

A message is msgpack ``[VERSION, tag, field, ...]`` in the order of the fields below. Offsets, lengths and sizes are
bytes; addresses are virtual addresses of the client; a batch of offsets is packed little-endian u64 in one bin.
"""

from __future__ import annotations

from .message import Message as Message

VERSION = 1


# attach socket: client -> supervisor
class Hello(Message, tag=1):
    """First message of a client. ``name`` is for people (status); ``kind`` is ``native``, ``vhost-user`` or ``vm``."""

    name: str
    kind: str


class OfferUserfaultfd(Message, tag=2, descriptors=1):
    """The client's userfaultfd (1 descriptor), made in the client, before its handshake (UFFDIO_API)."""


class OpenBlock(Message, tag=3):
    """Ask for a RAM block by name; ``mode`` is ``private`` or ``shared``. Of a client of kind ``vm`` it is ``own``: its
    memory is its own, and the pages are copied into it."""

    name: str
    mode: str


class Mapped(Message, tag=4):
    """The client has mapped ``length`` bytes of ``block`` from ``offset`` at ``address`` and touched none of them."""

    block: int
    address: int
    length: int
    offset: int


class Unmap(Message, tag=5):
    """The client no longer touches the region at ``address`` and is about to unmap it."""

    block: int
    address: int


class Goodbye(Message, tag=6):
    """The client leaves; all its regions are unmapped."""


class Resume(Message, tag=7):
    """Instead of OfferUserfaultfd: the same process was client ``client`` of this supervisor or its predecessor, whose
    connection has ended."""

    client: int


class OfferBackEnd(Message, tag=8, descriptors=2):
    """Instead of OfferUserfaultfd, by one that speaks for another process, a vhost-user back-end or a virtual machine:
    the userfaultfd of that process, after its handshake, and a pidfd of it (2 descriptors). Regions are now those of
    that process, which registers them."""


class ListBlocks(Message, tag=12):
    """Ask which blocks there are."""


class AskLoss(Message, tag=13):
    """Ask why the page of ``block`` at ``offset`` is lost for client ``client`` (0: who asks). Block 0: why the page
    is, for which that client's worker made SIGBUS last; the client may have ended since."""

    client: int
    block: int
    offset: int


class AskOrphanPolicy(Message, tag=9):
    """Ask what is to become of missing pages when every process of the service has died (``--on-orphan``)."""


# attach socket: supervisor -> client
class Welcome(Message, tag=20, descriptors=1):
    """Answer to Hello: the client's number; 1 descriptor: an open /dev/userfaultfd, or none if there is no device."""

    client: int


class UserfaultfdAccepted(Message, tag=21):
    """The descriptor is a userfaultfd; the supervisor has done its handshake and keeps it."""


class BlockOpened(Message, tag=22, descriptors=3):
    """Answer to OpenBlock. ``size`` is the exact length, the mapping is ``pages * page_size``. 2 descriptors: the
    block (read-only for ``private``, read-write for ``shared``) and the received map (read-only, one byte a page). For
    ``own`` also the client's copied map, read-only: hold it, and a rescue finds it there."""

    block: int
    name: str
    size: int
    page_size: int
    pages: int


class Attached(Message, tag=23):
    """The region is registered and its worker runs: it may be touched now."""

    block: int
    address: int


class Unmapped(Message, tag=24):
    """The region is forgotten: unmap it now."""

    block: int
    address: int


class Refused(Message, tag=25):
    """The request is refused. ``code`` is one of ``REFUSALS``; ``reason`` is one line for people."""

    code: str
    reason: str


class Ending(Message, tag=26):
    """The supervisor ends in order: every page that is still missing is poisoned (SIGBUS), none is zeros."""

    reason: str


class Released(Message, tag=27):
    """Every page of ``block`` is present and its ranges are unregistered: it is ordinary memory now."""

    block: int


class Resumed(Message, tag=28):
    """Answer to Resume: all regions are as before. ``released``: numbers of complete blocks (packed u64)."""

    released: bytes


class Listed(Message, tag=105):
    """A block in the answer to ListBlocks. ``shared``: the user who asks may attach it in that mode, too."""

    name: str
    size: int
    page_size: int
    shared: bool


class Blocks(Message, tag=32):
    """Answer to ListBlocks."""

    blocks: tuple[Listed, ...]


class Loss(Message, tag=33):
    """Answer to AskLoss: a block's name, a page's offset, and the words of its source or handler function. Empty where
    that is not known."""

    block: str
    offset: int
    reason: str


class OrphanPolicy(Message, tag=29, descriptors=1):
    """Answer to AskOrphanPolicy. ``poison``: the client is to have a watcher, which poisons missing pages
    ``timeout_ms`` after the last process of the service has died. Then 1 descriptor: the lifeline, the reading end of a
    pipe whose writing end every process of the service holds."""

    timeout_ms: int
    poison: bool


REFUSALS = ("no-such-block", "denied", "bad-message", "bad-version", "bad-descriptor", "bad-range", "limit", "failed")


# router: worker -> supervisor
class WorkerHello(Message, tag=40):
    """A worker is connected: sent at start and after every reconnect."""

    worker: int
    incarnation: int
    pid: int


class Report(Message, tag=41):
    """An event for people. ``kind`` is one of ``REPORTS``."""

    worker: int
    kind: str
    block: int
    offset: int
    detail: str


class RequestPages(Message, tag=42):
    """Pages of a remote block that the worker's client waits for (packed u64 offsets). Taken by
    ``MainLoop.on_message``."""

    worker: int
    block: int
    offsets: bytes


class Fetched(Message, tag=43):
    """Worker zero's answer to Fetch: all of the range is present except the pages at ``lost`` (packed u64)."""

    block: int
    offset: int
    length: int
    lost: bytes


REPORTS = (
    "lost",  # a page that its source cannot supply
    "source-changed",  # the file under a local block was cut or written
    "polluted",  # a page that is present, but that no program of ours placed
    "handler-failed",  # a handler function raised, or returned something unusable
    "foreign-event",  # the ufd delivered an event that is not a page fault
    "outside",  # a fault outside every region
    "stale-region",  # a region that is no longer as registered (ENOENT)
    "client-gone",  # the client's memory is gone (ESRCH)
    "no-memory",  # ENOMEM or ENOSPC while placing; the page is retried
    "kill",  # a lost page of a client that is not to go on without it: the supervisor kills it
    "failed",  # the worker cannot continue: it ends after this report
)


# router: supervisor -> worker
class Wake(Message, tag=50):
    """Pages of a remote block are placed: wake their waiters (packed u64 offsets). Block 0 answers WorkerHello:
    earlier answers may be lost, so wake the whole client and request again what it then faults on. Taken by
    ``WakerThread.run``."""

    block: int
    offsets: bytes


class Lost(Message, tag=52):
    """Pages of a remote block that cannot be had: poison them for the waiting client (packed u64 offsets)."""

    block: int
    offsets: bytes


class Fetch(Message, tag=51):
    """To worker zero, which places pages for the supervisor: make this range of a local block present."""

    block: int
    offset: int
    length: int


# router: command line <-> supervisor
class AskStatus(Message, tag=60):
    """Ask for the status. ``audit``: first search every block for pages that no program of ours placed."""

    audit: bool


class AskStop(Message, tag=61):
    """End in order; ``keep_workers`` leaves clients and workers to a successor."""

    keep_workers: bool


class AskExport(Message, tag=62):
    """Write the block ``name`` to the absolute ``path``; answered by ExportProgress at once and to every
    AskProgress."""

    name: str
    path: str


class AskProgress(Message, tag=63):
    """Ask for the progress of an export. Without this request for 10 s, or with ``cancel``, it is cancelled."""

    job: int
    cancel: bool


class AskStory(Message, tag=64):
    """Ask for the history of the page at ``offset`` of the block ``name``."""

    name: str
    offset: int


class AskEvents(Message, tag=65):
    """Ask for the kept events with numbers greater than ``after``."""

    after: int


class AskResume(Message, tag=66):
    """End the quarantine of a client (0: of worker zero): it gets a new worker, and its crashes are forgotten."""

    client: int


class StatusAnswer(Message, tag=70):
    """The status document as UTF-8 JSON (its fields are part of the interface, not of the wire)."""

    document: bytes


class StopAnswer(Message, tag=71):
    """The supervisor has begun to end."""

    pid: int


class ExportProgress(Message, tag=72):
    """``state`` is ``running``, ``done``, ``failed`` or ``cancelled``; ``detail`` says why it failed."""

    job: int
    state: str
    written: int
    size: int
    detail: str


class ControlRefused(Message, tag=73):
    """A request of the command line that is refused; ``reason`` is one line for people."""

    reason: str


class StoryAnswer(Message, tag=74):
    """The history of a page as UTF-8 JSON."""

    document: bytes


class EventsAnswer(Message, tag=75):
    """Events, oldest first, as a UTF-8 JSON array in the form of ``events`` in the status document."""

    document: bytes


class ResumeAnswer(Message, tag=76):
    """The quarantine is over. ``unpoisoning``: how many pages it had poisoned that are fetched now."""

    client: int
    unpoisoning: int


# custodian channel: supervisor -> custodian
class Keep(Message, tag=80, descriptors=16):
    """Keep duplicates of these descriptors under ``key``, replacing what was there. ``meta`` is a note of the
    supervisor, returned unread."""

    key: str
    meta: bytes


class Drop(Message, tag=81):
    """Close what is kept under ``key``."""

    key: str


class ForkWorker(Message, tag=82):
    """Fork a worker that gets the descriptors of ``keys``, in order, and ``assignment`` (an encoded Assignment)."""

    worker: int
    incarnation: int
    keys: tuple[str, ...]
    assignment: bytes


class TakeOver(Message, tag=83):
    """First message on the custodian's socket: a new supervisor asks for everything that is kept. The custodian keeps
    it too, so a connection that ends changes nothing."""

    pid: int


class Adopt(Message, tag=84, descriptors=1):
    """A worker that another custodian forked: watch it, and replace it while there is no supervisor. 1 descriptor: its
    pidfd; ``keys`` and ``assignment`` as in ForkWorker."""

    worker: int
    incarnation: int
    pid: int
    keys: tuple[str, ...]
    assignment: bytes


class WhenOrphaned(Message, tag=85):
    """What to do without a supervisor. After ``timeout_ms``, missing pages of remote blocks are poisoned when touched
    (``poison``), or their clients wait on. When no client is left, the custodian ends."""

    timeout_ms: int
    poison: bool


class Dismiss(Message, tag=86):
    """The supervisor ends in order: forget everything and end when the last worker has ended."""


# custodian channel: custodian -> supervisor
class CustodianReady(Message, tag=90):
    """Everything that workers need is imported: the custodian is ready."""

    pid: int


class WorkerForked(Message, tag=91, descriptors=1):
    """The worker runs; 1 descriptor: its pidfd."""

    worker: int
    incarnation: int
    pid: int


class ForkFailed(Message, tag=92):
    """There is no worker: fork failed, or a key is not kept here."""

    worker: int
    incarnation: int
    reason: str


class WorkerExited(Message, tag=93):
    """A worker has ended and is reaped; ``status`` is the wait status (see os.waitstatus_to_exitcode)."""

    worker: int
    incarnation: int
    status: int


class Kept(Message, tag=94, descriptors=16):
    """Answer to TakeOver, one for each key: key and note of Keep, and the descriptors."""

    key: str
    meta: bytes


class InventoryEnd(Message, tag=95):
    """The end of ``kept`` Kept and ``workers`` WorkerForked (one for each living worker). From here on the channel is
    an ordinary one."""

    pid: int
    kept: int
    workers: int


# what a worker gets when it is forked
class BlockGrant(Message, tag=100):
    """A block as a worker sees it.

    Positions in the worker's list of descriptors (-1: none): ``memory`` (read-write), ``received`` (read-write),
    ``source`` (the file). ``kind`` is ``file``, ``qemu-ram``, ``handler``, ``zero``, ``remote``. Without a source it is
    ``quarantined`` or ``orphaned``, and missing pages are poisoned. ``detail`` is ``module:function`` of a handler, or
    the reason; of a file ``copy``, or ``digests``, which are in the descriptor after ``source``; of ``qemu-ram`` that
    behind the places of bitmap and pages in the file (``142:1048576:digests``). ``source_size`` and
    ``source_stamp`` (see ``postcopy_kernel.filestamp``) are the file's when serving began."""

    block: int
    name: str
    size: int
    page_size: int
    pages: int
    kind: str
    detail: str
    source_size: int
    source_stamp: bytes
    memory: int
    received: int
    source: int


class RegionGrant(Message, tag=101):
    """A registered range of the client: ``length`` bytes at ``address`` are the block's from ``offset``. ``mode`` is
    ``private``, ``shared``, or one of ``copied_map.OWN``."""

    block: int
    mode: str
    address: int
    length: int
    offset: int


class Assignment(Message, tag=102):
    """All that a worker is given.

    Positions in its list of descriptors (-1: none): the client's userfaultfd and pidfd (none for worker zero), the quit
    eventfd, the statistics page, the control page, an open /dev/userfaultfd (``device``). The descriptors from
    ``cgroup`` on are ``cgroup.procs`` files into which the worker writes itself. ``fault_around`` is the largest window
    in bytes; ``adaptive``: it grows from one page, otherwise it is fixed. ``sandbox`` is auto, all or off.
    ``transport`` is native or libzmq: what its channel to the supervisor is made of. ``copied_map``: position of the
    copied map of a client with memory of its own."""

    worker: int
    incarnation: int
    name: str
    endpoint: str
    userfaultfd: int
    client_pidfd: int
    quit_eventfd: int
    statistics_page: int
    control_page: int
    device: int
    fault_around: int
    adaptive: bool
    handler_path: str
    sandbox: str
    cgroup: int
    blocks: tuple[BlockGrant, ...]
    regions: tuple[RegionGrant, ...]
    transport: str
    copied_map: int


# notes of a supervisor to its successor: the ``meta`` of Keep, which a custodian does not read
class BlockNote(Message, tag=103):
    """Key ``block/N``; descriptors: memory, received map, and the file of a local block. ``source`` is SOURCE as given
    to serve; ``kind``, ``detail`` as in BlockGrant; ``identity`` is that of Advised, for a remote source."""

    block: int
    name: str
    source: str
    size: int
    page_size: int
    kind: str
    detail: str
    identity: str
    source_size: int
    source_stamp: bytes


class ClientNote(Message, tag=104):
    """Key ``client/N``; descriptors: userfaultfd, pidfd, statistics page; where another process speaks for the client a
    pidfd of that; where its memory is its own the copied map. Kept again before a change is answered."""

    client: int
    name: str
    kind: str
    uid: int
    pid: int
    quarantined: bool
    back_end: bool
    regions: tuple[RegionGrant, ...]
    released: tuple[RegionGrant, ...]


# what a supervisor leaves in the runtime directory for the case that every process of the service dies at once
class BlockRecord(Message, tag=106):
    """The file ``block-N`` of the directory ``private/rescue``. ``note`` is an encoded BlockNote. Memory, received map
    and the file of a local block (0: none) by device and inode. ``original``: stamp of the file behind a copy."""

    note: bytes
    boot: str
    memory_device: int
    memory_inode: int
    map_device: int
    map_inode: int
    file_device: int
    file_inode: int
    original: bytes


class ClientRecord(Message, tag=107):
    """The file ``client-N``. ``note`` is an encoded ClientNote; ``started`` is when its process was started, in clock
    ticks since ``boot`` (0: not known here, as in another pid namespace). The same of a back-end's front-end.
    ``copied_inode``: of the copied map of a client with memory of its own, or 0."""

    note: bytes
    boot: str
    started: int
    front_end: int
    front_end_started: int
    copied_inode: int
