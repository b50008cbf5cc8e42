//! One client: negotiation, then requests in and replies out.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;

use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::proto::{
    Command, EXPORT_FLAGS, HANDSHAKE_FLAGS, MAX_DATA, NBD_MAGIC, OPTION_MAGIC, Request, option, option_reply, reply,
};
use crate::mirror::core::extent::{Extent, Geometry};
use crate::mirror::io::Buffer;

/// Longest option in bytes: a name and a list of what is asked for.
const MAX_OPTION: u32 = 8192;

/// Bytes of writes that one client may have under way. The kernel's has 128 requests, seldom of more than 256 KiB.
const UNANSWERED: u64 = 32 << 20;

/// Requests of one client that are carried out at once.
const THREADS: usize = 16;
/// Bytes: as for the threads that wait for disks.
const STACK: usize = 256 * 1024;
/// Bytes: a few small requests.
const INTAKE: usize = 16 * 1024;
/// A client that had several requests under way must have sent so many one after the other to be taken for one that does that.
const SEVERAL: u32 = 32;

/// What the disk is asked, with whom to answer.
pub struct Ask {
    /// What.
    pub what: What,
    /// On stable storage before the answer.
    pub fua: bool,
    /// To whom.
    pub to: Answer,
}

/// A request that has passed all checks.
pub enum What {
    /// Contents.
    Read(Extent),
    /// New contents.
    Write(Extent, Bytes),
    /// Zeroes; `true` gives the space back.
    Zero(Extent, bool),
    /// Stable storage.
    Flush,
}

/// Where an answer goes. One is to be sent; dropping it leaves the client without.
pub struct Answer {
    client: Arc<Client>,
    cookie: u64,
    _room: Room,
}

impl Answer {
    /// The request is done; a read has these contents.
    pub fn done(self, data: &[u8]) {
        self.client.send(0, self.cookie, data);
    }

    /// It failed.
    pub fn failed(self, error: &io::Error) {
        let errno = match error.raw_os_error() {
            Some(errno @ (libc::EPERM | libc::EINVAL | libc::ENOSPC | libc::ENOMEM)) => errno as u32,
            _ => libc::EIO as u32,
        };
        self.client.send(errno, self.cookie, &[]);
    }
}

/// A connection's sending half.
pub struct Client {
    stream: Mutex<UnixStream>,
    /// Requests that are not answered.
    under_way: AtomicUsize,
    /// Bytes of writes that are not answered.
    taken: Mutex<u64>,
    answered: Condvar,
}

/// What a request takes until it is answered: a write some of the client's share of the memory.
struct Room {
    client: Arc<Client>,
    bytes: u64,
}

impl Room {
    /// Waits until there is some. Whoever writes faster than writes are let in waits in his own socket.
    fn wait(client: &Arc<Client>, bytes: u32) -> Self {
        client.under_way.fetch_add(1, Ordering::Relaxed);
        let bytes = u64::from(bytes);
        if bytes == 0 {
            return Self { client: client.clone(), bytes };
        }
        let taken = client.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut u64| *taken > 0 && *taken + bytes > UNANSWERED;
        *client.answered.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner) += bytes;
        Self { client: client.clone(), bytes }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.client.under_way.fetch_sub(1, Ordering::Relaxed);
        if self.bytes > 0 {
            *self.client.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
            self.client.answered.notify_one();
        }
    }
}

impl Client {
    fn send(&self, error: u32, cookie: u64, data: &[u8]) {
        let header = reply(error, cookie);
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, total) = (0, header.len() + data.len());
        while at < total {
            let parts =
                [IoSlice::new(&header[at.min(header.len())..]), IoSlice::new(&data[at.saturating_sub(header.len())..])];
            match stream.write_vectored(&parts) {
                Ok(n) if n > 0 => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A client that is gone learns nothing; it sends its request again to whoever comes next.
                _ => {
                    drop(stream.shutdown(Shutdown::Both));
                    return;
                }
            }
        }
    }
}

/// Serves one client that negotiates, until it leaves. Blocks. `ask` is called for every valid request, on several threads;
/// it may block for as long as a request takes.
///
/// # Errors
/// The stream's, or a client that does not follow the protocol.
pub fn serve(
    stream: UnixStream,
    name: &str,
    geometry: Geometry,
    ask: impl Fn(Ask) + Send + Sync + 'static,
) -> io::Result<()> {
    let mut negotiating = stream.try_clone()?;
    if negotiate(&mut negotiating, name, geometry)? { transmit(stream, geometry, ask) } else { Ok(()) }
}

fn protocol(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut raw = [0; N];
    from.read_exact(&mut raw)?;
    Ok(raw)
}

/// `false` when the client only asked.
fn negotiate(stream: &mut (impl Read + Write), name: &str, geometry: Geometry) -> io::Result<bool> {
    stream.write_all(&NBD_MAGIC.to_be_bytes())?;
    stream.write_all(&OPTION_MAGIC.to_be_bytes())?;
    stream.write_all(&HANDSHAKE_FLAGS.to_be_bytes())?;
    let flags = u32::from_be_bytes(read(stream)?);
    let no_zeroes = flags & 2 != 0;
    loop {
        if u64::from_be_bytes(read(stream)?) != OPTION_MAGIC {
            return Err(protocol("not an NBD option"));
        }
        let code = u32::from_be_bytes(read(stream)?);
        let length = u32::from_be_bytes(read(stream)?);
        if length > MAX_OPTION {
            return Err(protocol("an NBD option is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        let ours = |asked: &[u8]| asked.is_empty() || asked == name.as_bytes();
        match code {
            option::EXPORT_NAME => {
                if !ours(&data) {
                    return Err(protocol("the client asks for another export"));
                }
                stream.write_all(&geometry.size.to_be_bytes())?;
                stream.write_all(&EXPORT_FLAGS.to_be_bytes())?;
                stream.write_all(if no_zeroes { &[] } else { &[0; 124] })?;
                return Ok(true);
            }
            option::ABORT => {
                option_reply(stream, code, option::REPLY_ACK, &[])?;
                return Ok(false);
            }
            option::LIST => {
                let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                entry.extend_from_slice(name.as_bytes());
                option_reply(stream, code, option::REPLY_SERVER, &entry)?;
                option_reply(stream, code, option::REPLY_ACK, &[])?;
            }
            option::INFO | option::GO => {
                let Some(asked) = info_name(&data) else {
                    option_reply(stream, code, option::REPLY_INVALID, &[])?;
                    continue;
                };
                if !ours(asked) {
                    option_reply(stream, code, option::REPLY_UNKNOWN, &[])?;
                    continue;
                }
                let mut info = option::INFO_EXPORT.to_be_bytes().to_vec();
                info.extend_from_slice(&geometry.size.to_be_bytes());
                info.extend_from_slice(&EXPORT_FLAGS.to_be_bytes());
                option_reply(stream, code, option::REPLY_INFO, &info)?;
                let mut info = option::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                for size in [geometry.block, 4096, MAX_DATA] {
                    info.extend_from_slice(&size.to_be_bytes());
                }
                option_reply(stream, code, option::REPLY_INFO, &info)?;
                option_reply(stream, code, option::REPLY_ACK, &[])?;
                if code == option::GO {
                    return Ok(true);
                }
            }
            _ => option_reply(stream, code, option::REPLY_UNSUPPORTED, &[])?,
        }
    }
}

/// The name in the data of `INFO` and `GO`: length, name, a list that is not looked at.
fn info_name(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.get(..u32::from_be_bytes(*length) as usize)
}

/// Serves a client that is past negotiation, as the kernel's is. Blocks until it leaves. `ask` as in [`serve`].
///
/// # Errors
/// The stream's, or something that is not a request.
pub fn transmit(stream: UnixStream, geometry: Geometry, ask: impl Fn(Ask) + Send + Sync + 'static) -> io::Result<()> {
    let client = Client {
        stream: Mutex::new(stream.try_clone()?),
        under_way: AtomicUsize::new(0),
        taken: Mutex::new(0),
        answered: Condvar::new(),
    };
    let intake = Arc::new(Intake {
        client: Arc::new(client),
        geometry,
        stream: Mutex::new(Some(Stream { from: BufReader::with_capacity(INTAKE, stream), several: 0 })),
        readers: AtomicUsize::new(0),
        threads: AtomicUsize::new(1),
        failed: Mutex::new(None),
        ask,
    });
    intake.work();
    let failed = intake.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
    failed.map_or(Ok(()), Err)
}

/// Where requests come from. Its threads take turns in reading one, and each carries out what it has read: so a request is not
/// handed from one thread to another on its way. For a client that sends one after the other, its thread keeps its turn: no
/// other one has to wake up.
struct Intake<F> {
    client: Arc<Client>,
    geometry: Geometry,
    /// Until the client has left.
    stream: Mutex<Option<Stream>>,
    /// Threads that read or wait for their turn.
    readers: AtomicUsize,
    threads: AtomicUsize,
    failed: Mutex<Option<io::Error>>,
    ask: F,
}

struct Stream {
    from: BufReader<UnixStream>,
    /// For so many requests more, if none of them meets another one, the client is taken for one that has several under way.
    several: u32,
}

impl Stream {
    /// Whether the client has sent more meanwhile.
    fn has_more(&self) -> bool {
        let mut socket = [PollFd::new(self.from.get_ref().as_fd(), PollFlags::POLLIN)];
        !self.from.buffer().is_empty() || !matches!(poll(&mut socket, PollTimeout::ZERO), Ok(0))
    }
}

impl<F: Fn(Ask) + Send + Sync + 'static> Intake<F> {
    fn work(self: &Arc<Self>) {
        loop {
            self.readers.fetch_add(1, Ordering::Relaxed);
            let ask = self.read();
            let last = self.readers.fetch_sub(1, Ordering::Relaxed) == 1;
            match ask {
                Ok(Some(ask)) => {
                    if last {
                        self.another();
                    }
                    (self.ask)(ask);
                }
                Ok(None) => return,
                Err(error) => {
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        }
    }

    /// Nobody would read while this thread is busy.
    fn another(self: &Arc<Self>) {
        let more = |count| (count < THREADS).then_some(count + 1);
        if self.threads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
            let intake = self.clone();
            let started = Builder::new().name("nbd".into()).stack_size(STACK).spawn(move || intake.work());
            if started.is_err() {
                // Then those that there are have to do.
                self.threads.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// The next request that others have to be let read meanwhile; `None` when there are no more.
    fn read(&self) -> io::Result<Option<Ask>> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Some(open) = stream.as_mut() else { return Ok(None) };
            match self.next(&mut open.from) {
                Ok(Next::Ask(ask)) => {
                    let short = matches!(ask.what, What::Read(_) | What::Write(..)) && !ask.fua;
                    let alone = self.client.under_way.load(Ordering::Relaxed) == 1 && open.from.buffer().is_empty();
                    if !(short && alone && open.several == 0) {
                        open.several = if alone { open.several.saturating_sub(1) } else { SEVERAL };
                        return Ok(Some(ask));
                    }
                    (self.ask)(ask);
                    if open.has_more() {
                        open.several = SEVERAL;
                    }
                }
                Ok(Next::Refused) => {}
                Ok(Next::End) => *stream = None,
                Err(error) => {
                    *stream = None;
                    return Err(error);
                }
            }
        }
    }

    fn next(&self, from: &mut BufReader<UnixStream>) -> io::Result<Next> {
        let request = match Request::read(from) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(Next::End),
            other => other?,
        };
        let extent = Extent::new(request.offset, request.length);
        let carries = matches!(request.command, Command::Read | Command::Write);
        if carries && request.length > MAX_DATA {
            // A write's data could be anything: the stream cannot be followed any further.
            return Err(protocol("a request is too large"));
        }
        let written = if request.command == Command::Write { request.length } else { 0 };
        let room = Room::wait(&self.client, written);
        let to = Answer { client: self.client.clone(), cookie: request.cookie, _room: room };
        let data = if request.command == Command::Write {
            let mut data = Buffer::stale(request.length as usize);
            from.read_exact(data.as_mut())?;
            Some(data)
        } else {
            None
        };
        let ranged = !matches!(request.command, Command::Flush | Command::Disconnect | Command::Other(_));
        let valid = !request.unknown_flags && (!ranged || self.geometry.check(extent).is_ok());
        let what = match (request.command, data) {
            (Command::Disconnect, _) => return Ok(Next::End),
            (Command::Read, _) if valid => What::Read(extent),
            (Command::Write, Some(data)) if valid => What::Write(extent, Bytes::from_owner(data)),
            (Command::WriteZeroes, _) if valid => What::Zero(extent, !request.no_hole),
            (Command::Trim, _) if valid => What::Zero(extent, true),
            (Command::Flush, _) if valid => What::Flush,
            _ => {
                to.failed(&io::Error::from_raw_os_error(libc::EINVAL));
                return Ok(Next::Refused);
            }
        };
        Ok(Next::Ask(Ask { what, fua: request.fua, to }))
    }
}

enum Next {
    Ask(Ask),
    /// And answered.
    Refused,
    End,
}
