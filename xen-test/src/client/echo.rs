//! The echo client, TCP or UDP, at a steady rate.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use xen_test_guest::protocol::{Datagram, MAX_PAYLOAD};

use super::Spread;
use super::journal::Journal;

/// One request and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// When the request was sent.
    pub sent: Instant,
    /// When its first answer came; `None` so far or for ever.
    pub answered: Option<Instant>,
    /// Place of the answer among all the guest has made since boot.
    pub count: u64,
    /// The guest's time of the answer.
    pub t_ns: u64,
    /// Answers beyond the first.
    pub repeats: u32,
}

/// What the exchanges have shown so far.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EchoReport {
    /// Requests sent.
    pub sent: u64,
    /// Requests answered.
    pub answered: u64,
    /// Answers that came more than once.
    pub repeats: u64,
    /// Answers, in order of arrival, whose count was not above that of an
    /// earlier arrival: over TCP this means that the guest went back in time
    /// behind something it had said.
    pub regressions: u64,
    /// Round trips.
    pub rtt: Spread,
    /// Why the connection ended; `None` while it lives, always for UDP.
    pub ended: Option<String>,
}

/// Sends `echo SEQ` at a rate, whether answers come or not, until dropped.
pub struct EchoClient {
    tcp: Option<TcpStream>,
    /// Its threads end when they find it gone.
    _udp: Option<Arc<UdpSocket>>,
    journal: Journal<Exchange>,
    /// Dropped to end the threads.
    alive: Option<Sender<()>>,
}

impl EchoClient {
    /// Over TCP: `hz` requests per second (above 0) of `payload` bytes.
    ///
    /// # Errors
    /// No connection within `timeout`.
    pub fn tcp(to: SocketAddr, hz: f64, payload: usize, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_nodelay(true)?;
        let journal = Journal::new();
        let (theirs, reader) = (journal.clone(), stream.try_clone()?);
        thread::Builder::new().name("echo-read".into()).spawn(move || {
            let mut reader = BufReader::new(&reader);
            let mut line = String::new();
            loop {
                line.clear();
                match reader.read_line(&mut line) {
                    Ok(0) => return theirs.end("the guest closed the connection"),
                    Err(e) => return theirs.end(e.to_string()),
                    Ok(_) => note(&theirs, &line),
                }
            }
        })?;
        let mut writer = stream.try_clone()?;
        let alive = send_steadily(hz, journal.clone(), move |seq| {
            writer.write_all(Datagram::Echo { seq }.padded(payload).as_bytes())
        })?;
        Ok(Self { tcp: Some(stream), _udp: None, journal, alive: Some(alive) })
    }

    /// Over UDP.
    ///
    /// # Errors
    /// No socket, or no route to the guest.
    pub fn udp(to: SocketAddr, hz: f64, payload: usize) -> io::Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        // Not connected: a "port unreachable" while the guest is elsewhere
        // must not become an error of ours.
        let socket = Arc::new(UdpSocket::bind((any, 0))?);
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let journal = Journal::new();
        let (theirs, reader) = (journal.clone(), Arc::downgrade(&socket));
        thread::Builder::new().name("echo-read".into()).spawn(move || {
            let mut buffer = vec![0; MAX_PAYLOAD + 1];
            while let Some(socket) = reader.upgrade() {
                if let Ok((got, from)) = socket.recv_from(&mut buffer)
                    && from.ip() == to.ip()
                {
                    note(&theirs, &String::from_utf8_lossy(&buffer[..got]));
                }
            }
        })?;
        let writer = Arc::downgrade(&socket);
        let alive = send_steadily(hz, journal.clone(), move |seq| {
            if let Some(socket) = writer.upgrade() {
                // Unreachable now is a lost datagram, nothing more.
                let _ = socket.send_to(Datagram::Echo { seq }.padded(payload).as_bytes(), to);
            }
            Ok(())
        })?;
        Ok(Self { tcp: None, _udp: Some(socket), journal, alive: Some(alive) })
    }

    /// All exchanges; the sequence number is the index.
    pub fn exchanges(&self) -> Vec<Exchange> {
        self.journal.read(<[Exchange]>::to_vec)
    }

    /// The first answer that arrived after `when`, waiting up to `timeout`.
    pub fn first_answer_after(&self, when: Instant, timeout: Duration) -> Option<Exchange> {
        self.journal.wait(Instant::now() + timeout, |all| {
            all.iter().filter(|e| e.answered.is_some_and(|a| a > when)).min_by_key(|e| e.answered).copied()
        })
    }

    /// Sums up all exchanges so far.
    pub fn report(&self) -> EchoReport {
        let ended = self.journal.ended();
        let all = self.exchanges();
        let mut answered: Vec<(Instant, &Exchange)> = all.iter().filter_map(|e| Some((e.answered?, e))).collect();
        answered.sort_by_key(|(at, e)| (*at, e.count));
        let mut highest = 0;
        let mut regressions = 0;
        for (_, e) in &answered {
            regressions += u64::from(e.count <= highest);
            highest = highest.max(e.count);
        }
        EchoReport {
            sent: all.len() as u64,
            answered: answered.len() as u64,
            repeats: all.iter().map(|e| u64::from(e.repeats)).sum(),
            regressions,
            rtt: Spread::of(answered.iter().map(|(at, e)| *at - e.sent)),
            ended,
        }
    }
}

impl Drop for EchoClient {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(stream) = &self.tcp {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Enters a request into the journal, then sends it, `hz` times a second.
fn send_steadily(
    hz: f64,
    journal: Journal<Exchange>,
    mut send: impl FnMut(u64) -> io::Result<()> + Send + 'static,
) -> io::Result<Sender<()>> {
    let (alive, ended) = mpsc::channel::<()>();
    let step = Duration::try_from_secs_f64(1.0 / hz)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the rate must be above 0"))?;
    thread::Builder::new().name("echo-send".into()).spawn(move || {
        let mut due = Instant::now();
        let mut seq = 0;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(due.saturating_duration_since(Instant::now())) {
            journal.push(Exchange { sent: Instant::now(), answered: None, count: 0, t_ns: 0, repeats: 0 });
            if let Err(e) = send(seq) {
                return journal.end(e.to_string());
            }
            seq += 1;
            due = (due + step).max(Instant::now());
        }
    })?;
    Ok(alive)
}

fn note(journal: &Journal<Exchange>, text: &str) {
    let at = Instant::now();
    // Anything else on this port is not from a guest of ours.
    let Ok(Datagram::Answer { seq, count, t_ns }) = text.parse() else { return };
    journal.update(|all| {
        let Some(e) = usize::try_from(seq).ok().and_then(|i| all.get_mut(i)) else { return };
        if e.answered.is_some() {
            e.repeats += 1;
        } else {
            (e.answered, e.count, e.t_ns) = (Some(at), count, t_ns);
        }
    });
}
