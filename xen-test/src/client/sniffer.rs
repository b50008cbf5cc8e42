//! A passive sniffer: every frame that the guest's MAC sent and that reached
//! the client's interface. It proves what did *not* leak.

use std::io::{self, PipeWriter};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::frame::{Frame, Mac};
use super::journal::Journal;
use super::packet::{Interface, PacketError, PacketSocket};

/// All that was captured.
#[derive(Debug, Clone)]
pub struct Capture {
    /// The guest's frames in order of arrival.
    pub frames: Vec<Frame>,
    /// Frames (of anybody) that the kernel could not keep for us. With any of
    /// them the capture proves nothing.
    pub dropped: u32,
    /// Why capturing ended before it was stopped.
    pub failed: Option<String>,
}

impl Capture {
    /// Frames that arrived from `from` on and before `to`.
    pub fn between(&self, from: Instant, to: Instant) -> impl Iterator<Item = &Frame> {
        self.frames.iter().filter(move |f| f.at >= from && f.at < to)
    }
}

/// Captures on a thread of its own until stopped or dropped.
pub struct Sniffer {
    journal: Journal<Frame>,
    dropped: Arc<AtomicU32>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Captures what comes in on `interface` from `guest`. Whatever comes in
    /// after this returns is captured.
    ///
    /// # Errors
    /// [`PacketError`]: no such interface, or not privileged.
    pub fn start(interface: &str, guest: Mac) -> Result<Self, PacketError> {
        let err = |what| move |source| PacketError::Socket { interface: interface.into(), what, source };
        let mut socket = PacketSocket::open(interface, &Interface::find(interface)?)?;
        let (stopped, stop) = io::pipe().map_err(err("making a pipe"))?;
        let (journal, dropped) = (Journal::new(), Arc::new(AtomicU32::new(0)));
        let (theirs, their_dropped) = (journal.clone(), Arc::clone(&dropped));
        let run = move || {
            loop {
                match socket.receive(None, &stopped) {
                    Ok(Some(raw)) if !raw.outgoing => {
                        let frame = Frame::parse(raw.at, raw.bytes);
                        their_dropped.store(socket.dropped(), Ordering::Relaxed);
                        if frame.from == guest {
                            theirs.push(frame);
                        }
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
                    Err(e) => return theirs.end(e.to_string()),
                }
            }
        };
        let thread = thread::Builder::new().name("sniffer".into()).spawn(run).map_err(err("making a thread"))?;
        Ok(Self { journal, dropped, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits for a frame for which `matches` holds, from the first captured on.
    pub fn wait_for(&self, timeout: Duration, matches: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let mut looked_at = 0;
        self.journal.wait(Instant::now() + timeout, |all| {
            let new = &all[looked_at..];
            looked_at = all.len();
            new.iter().find(|f| matches(f)).cloned()
        })
    }

    /// What was captured so far.
    pub fn capture(&self) -> Capture {
        Capture {
            frames: self.journal.read(<[Frame]>::to_vec),
            dropped: self.dropped.load(Ordering::Relaxed),
            failed: self.journal.ended(),
        }
    }

    /// Takes in what is still queued and stops.
    pub fn stop(mut self) -> Capture {
        self.join();
        self.capture()
    }

    fn join(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has told its story on stderr.
            let _ = thread.join();
        }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.join();
    }
}
