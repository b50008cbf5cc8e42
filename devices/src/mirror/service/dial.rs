//! The source's side of the stream: connects, agrees on what to synchronise, sends the log.

use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::engine::Engine;
use super::events::DiskEvent;
use super::node::Shared;
use crate::mirror::core::meta::Head;
use crate::mirror::core::resync::{Plan, plan};
use crate::mirror::core::source::SessionLimits;
use crate::mirror::peer::{Closed, Frame, Hello, Reader, Welcome, Writer};

/// A sign of life goes out when there was nothing else to say for so long.
const ALIVE: Duration = Duration::from_secs(1);
/// Without a byte from the peer for so long the session is over.
const SILENCE: Duration = Duration::from_secs(15);
/// Between attempts.
const RETRY: Duration = Duration::from_secs(2);
/// Small records are collected up to this size.
const BUFFER: usize = 256 * 1024;

/// A stream, and what ends it from outside.
struct Stream {
    from: Box<dyn Read + Send>,
    to: Box<dyn Write + Send>,
    end: Arc<dyn Fn() + Send + Sync>,
    child: Option<Child>,
}

/// Runs `via` in a shell, as a process group, and talks to its standard streams.
fn open(via: &str) -> std::io::Result<Stream> {
    if let Some(path) = via.strip_prefix("unix:") {
        let stream = UnixStream::connect(path)?;
        let (from, to) = (stream.try_clone()?, stream.try_clone()?);
        let end = Arc::new(move || drop(stream.shutdown(std::net::Shutdown::Both)));
        return Ok(Stream { from: Box::new(from), to: Box::new(to), end, child: None });
    }
    let mut child = Command::new("/bin/sh")
        .args(["-c", via])
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("the command has no standard streams"));
    };
    let group = Pid::from_raw(child.id() as i32);
    // Once only: later the number may be another process's.
    let running = Mutex::new(true);
    let end = Arc::new(move || {
        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *running)
            && let Err(error) = killpg(group, Signal::SIGKILL)
        {
            tracing::debug!(%error, %group, "the transport's processes are gone already");
        }
    });
    Ok(Stream { from: Box::new(from), to: Box::new(to), end, child: Some(child) })
}

impl Drop for Stream {
    fn drop(&mut self) {
        (self.end)();
        if let Some(child) = &mut self.child {
            drop(child.wait());
        }
    }
}

type End = Arc<dyn Fn() + Send + Sync>;

/// Keeps a session with the copy until it is dropped.
pub(super) struct Dialer {
    stop: Arc<(Mutex<bool>, Condvar)>,
    /// Ends the running session.
    end: Arc<Mutex<Option<End>>>,
    thread: Option<std::thread::JoinHandle<()>>,
    pub(super) via: String,
}

impl Dialer {
    pub(super) fn start(shared: Arc<Shared>, engine: Arc<Engine>, via: String) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let end = Arc::new(Mutex::new(None));
        let run = Run { shared, engine, via: via.clone(), stop: stop.clone(), end: end.clone() };
        let thread = std::thread::Builder::new().name("peer".into()).spawn(move || run.run())?;
        Ok(Self { stop, end, thread: Some(thread), via })
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(end) = end {
            end();
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Run {
    shared: Arc<Shared>,
    engine: Arc<Engine>,
    via: String,
    stop: Arc<(Mutex<bool>, Condvar)>,
    end: Arc<Mutex<Option<End>>>,
}

impl Run {
    fn run(self) {
        let mut told = String::new();
        loop {
            let (began, why) = self.session();
            if began {
                self.shared.parts.events.tell(&DiskEvent::Disconnected { why });
                told.clear();
            } else if why != told {
                self.shared.parts.events.tell(&DiskEvent::Unreachable { why: why.clone() });
                told = why;
            }
            let stop = self.stop.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (stop, _) =
                self.stop.1.wait_timeout_while(stop, RETRY, |stop| !*stop).unwrap_or_else(PoisonError::into_inner);
            if *stop {
                return;
            }
        }
    }

    /// One session. Whether it began, and why it ended.
    fn session(&self) -> (bool, String) {
        let mut stream = match open(&self.via) {
            Ok(stream) => stream,
            Err(error) => return (false, format!("{}: {error}", self.via)),
        };
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.end.clone());
        if *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) {
            return (false, "it was asked to stop".into());
        }
        let nonce = uuid::Uuid::new_v4().as_u128();
        let from = std::mem::replace(&mut stream.from, Box::new(std::io::empty()));
        let to = std::mem::replace(&mut stream.to, Box::new(std::io::sink()));
        let heard = Arc::new(AtomicU64::new(0));
        let from = Counting { from, heard: heard.clone() };
        let mut reader = Reader::new(BufReader::with_capacity(BUFFER, from), Some(nonce));
        let mut writer = Writer::new(BufWriter::with_capacity(BUFFER, to), nonce);
        let over = Arc::new(AtomicBool::new(false));
        let watch = watch(stream.end.clone(), heard.clone(), over.clone());
        let result = self.agree(&mut reader, &mut writer).map(|(peer, limits, regions)| {
            let session = self.engine.start_session(limits);
            self.shared.parts.events.tell(&DiskEvent::Connected { peer, regions });
            let why = self.talk(session, &mut reader, writer, &stream.end);
            self.engine.end_session(session);
            why
        });
        over.store(true, Ordering::Relaxed);
        watch.thread().unpark();
        drop(stream);
        drop(watch.join());
        match result {
            Ok(why) => (true, why),
            Err(why) => (false, why),
        }
    }

    fn agree(
        &self,
        reader: &mut Reader<impl Read>,
        writer: &mut Writer<impl Write>,
    ) -> Result<(String, SessionLimits, u32), String> {
        let mut send = |frame: &Frame| writer.send(frame).and_then(|()| writer.flush()).map_err(|e| e.to_string());
        let hello = Frame::Hello(Hello { disk: self.shared.name.clone(), host: host_name() });
        let sent = send(&hello);
        let welcome = match receive(reader) {
            Ok(Frame::Welcome(welcome)) => welcome,
            Ok(Frame::Refuse(_, text)) => return Err(text),
            Ok(other) => return Err(format!("the other host answered out of turn: {other:?}")),
            Err(why) => return Err(sent.err().unwrap_or(why)),
        };
        let Welcome { host, geometry, lineage, role, capacity, marks } = welcome;
        let ours = self.shared.head();
        let theirs = Head { lineage, role, ..Head::fresh(geometry, 0) };
        let plan = plan(&ours, &theirs, marks, uuid::Uuid::new_v4().as_u128()).map_err(|e| format!("{host}: {e}"))?;
        let (regions, new) = match plan {
            Plan::Union(regions) => (regions, None),
            Plan::Everything { lineage } => ((0..geometry.regions()).collect(), Some(lineage)),
        };
        // First the marks, then the word that they are the difference to this peer, then the peer may forget its own.
        if !self.engine.mark(regions) {
            return Err("the marks cannot be saved: look at the metadata file's disk".into());
        }
        if let Some(lineage) = new {
            self.shared.change_head(|head| head.lineage = lineage).map_err(|e| e.to_string())?;
        }
        send(&Frame::Start { lineage: self.shared.head().lineage })?;
        match receive(reader)? {
            Frame::Started => {}
            Frame::Refuse(_, text) => return Err(text),
            other => return Err(format!("the other host answered out of turn: {other:?}")),
        }
        let dirty = self.engine.with(|source| source.dirty_regions());
        Ok((host, SessionLimits::for_hosts(capacity, self.shared.memory), dirty))
    }

    /// Returns why it ended.
    fn talk(
        &self,
        session: u64,
        reader: &mut Reader<impl Read>,
        mut writer: Writer<impl Write + Send + 'static>,
        end: &End,
    ) -> String {
        let (engine, end_too) = (self.engine.clone(), end.clone());
        let sending = std::thread::spawn(move || {
            let why = send_log(&engine, session, &mut writer);
            end_too();
            why
        });
        let why = loop {
            match reader.receive() {
                Ok(Frame::Reply(reply)) => self.engine.reply(session, reply),
                Ok(Frame::Alive) => {}
                Ok(Frame::Refuse(_, text)) => break text,
                Ok(other) => break format!("the other host sent {other:?} out of turn"),
                Err(closed) => break closed.to_string(),
            }
        };
        end();
        self.engine.end_session(session);
        match sending.join() {
            Ok(Some(own)) => own,
            _ => why,
        }
    }
}

/// Until the session ends. Says why if the reason is on this side.
fn send_log(engine: &Arc<Engine>, session: u64, writer: &mut Writer<impl Write>) -> Option<String> {
    loop {
        // What is buffered goes out as soon as there is nothing to add.
        let record = match engine.next_record(session, Duration::ZERO) {
            Ok(None) => {
                if writer.flush().is_err() {
                    return None;
                }
                engine.next_record(session, ALIVE)
            }
            other => other,
        };
        let sent = match record {
            Ok(Some(record)) => writer.send(&Frame::Record(record)),
            Ok(None) => writer.send(&Frame::Alive),
            Err(()) => return Some("it was ended here: stopped, or the copy did not keep up".into()),
        };
        if sent.is_err() {
            return None;
        }
    }
}

fn receive(reader: &mut Reader<impl Read>) -> Result<Frame, String> {
    loop {
        match reader.receive() {
            Ok(Frame::Alive) => {}
            Ok(frame) => return Ok(frame),
            Err(Closed::Eof) => {
                return Err(
                    "the other host closed the stream: is its disk service running, with this disk's name?".into()
                );
            }
            Err(closed) => return Err(closed.to_string()),
        }
    }
}

/// Notes that something was heard.
struct Counting {
    from: Box<dyn Read + Send>,
    heard: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.from.read(into)?;
        self.heard.fetch_add(1, Ordering::Relaxed);
        Ok(count)
    }
}

/// Ends the stream when nothing was heard for too long.
fn watch(end: End, heard: Arc<AtomicU64>, over: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut last, mut since) = (heard.load(Ordering::Relaxed), Instant::now());
        while !over.load(Ordering::Relaxed) {
            std::thread::park_timeout(ALIVE);
            let now = heard.load(Ordering::Relaxed);
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > SILENCE {
                return end();
            }
        }
    })
}

pub(super) fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()).unwrap_or_else(|| "unknown host".into())
}
