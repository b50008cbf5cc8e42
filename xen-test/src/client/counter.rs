//! The counter client: one TCP connection that must survive everything.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use xen_test_guest::protocol::{CounterLine, Rate};

use super::journal::Journal;

/// One counter line as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// When the client read it.
    pub at: Instant,
    /// What it said.
    pub line: CounterLine,
}

/// What the connection has shown so far.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CounterReport {
    /// Lines received.
    pub lines: u64,
    /// Values that never came: each jump forward counts what it left out.
    pub gaps: u64,
    /// Lines whose value was not above the one before.
    pub regressions: u64,
    /// Lines whose guest time was before that of the line before.
    pub time_regressions: u64,
    /// Longest time without a line, in milliseconds, between two lines or
    /// since the last.
    pub longest_silence_ms: f64,
    /// Why the connection ended; `None` while it lives.
    pub ended: Option<String>,
}

/// Reads counter lines on a thread of its own until dropped. No keepalive,
/// no timeout: only the peer, or a reset by somebody, ends the connection.
pub struct CounterClient {
    stream: TcpStream,
    journal: Journal<Arrival>,
}

impl CounterClient {
    /// Connects and asks for lines.
    ///
    /// # Errors
    /// No connection within `timeout`.
    pub fn connect(to: SocketAddr, rate: Rate, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_nodelay(true)?;
        (&stream).write_all(format!("{rate}\n").as_bytes())?;
        let journal = Journal::new();
        let (theirs, reader) = (journal.clone(), stream.try_clone()?);
        thread::Builder::new().name("counter".into()).spawn(move || {
            let why = read_lines(&reader, &theirs);
            theirs.end(why);
        })?;
        Ok(Self { stream, journal })
    }

    /// Asks for another rate on the same connection.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn ask(&self, rate: Rate) -> io::Result<()> {
        (&self.stream).write_all(format!("{rate}\n").as_bytes())
    }

    /// The lines so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.journal.read(<[Arrival]>::to_vec)
    }

    /// The newest line.
    pub fn last(&self) -> Option<Arrival> {
        self.journal.read(|a| a.last().copied())
    }

    /// The first line that arrived after `when`, waiting up to `timeout`.
    pub fn first_after(&self, when: Instant, timeout: Duration) -> Option<Arrival> {
        self.journal.wait(Instant::now() + timeout, |all| {
            let first = all.partition_point(|a| a.at <= when);
            all.get(first).copied()
        })
    }

    /// Waits until the newest line says at least `n`.
    pub fn wait_for(&self, n: u64, timeout: Duration) -> Option<Arrival> {
        self.journal.wait(Instant::now() + timeout, |all| all.last().copied().filter(|a| a.line.n >= n))
    }

    /// Waits until no line came for `quiet`; the last one before that.
    /// `None` if lines still come at the end of `timeout`.
    pub fn wait_silent(&self, quiet: Duration, timeout: Duration) -> Option<Arrival> {
        let deadline = Instant::now() + timeout;
        loop {
            let last = self.last();
            let from = last.map_or_else(Instant::now, |a| a.at);
            if self.first_after(from, quiet.saturating_sub(from.elapsed())).is_none() && last.is_some() {
                return last;
            }
            if Instant::now() > deadline {
                return None;
            }
        }
    }

    /// Why the connection ended; `None` while it lives.
    pub fn ended(&self) -> Option<String> {
        self.journal.ended()
    }

    /// Sums up all lines so far.
    pub fn report(&self) -> CounterReport {
        self.report_of(|_| true)
    }

    /// Sums up the lines that arrived from `from` on.
    pub fn report_since(&self, from: Instant) -> CounterReport {
        self.report_of(|a| a.at >= from)
    }

    fn report_of(&self, counts: impl Fn(&Arrival) -> bool) -> CounterReport {
        let ended = self.ended();
        self.journal.read(|all| {
            let all: Vec<&Arrival> = all.iter().filter(|a| counts(a)).collect();
            let mut r = CounterReport {
                lines: all.len() as u64,
                gaps: 0,
                regressions: 0,
                time_regressions: 0,
                longest_silence_ms: 0.0,
                ended,
            };
            let mut silence = Duration::ZERO;
            for pair in all.windows(2) {
                let (a, b) = (pair[0], pair[1]);
                silence = silence.max(b.at - a.at);
                match b.line.n.checked_sub(a.line.n) {
                    None | Some(0) => r.regressions += 1,
                    Some(step) => r.gaps += step - 1,
                }
                r.time_regressions += u64::from(b.line.t_ns < a.line.t_ns);
            }
            if let (Some(last), None) = (all.last(), &r.ended) {
                silence = silence.max(last.at.elapsed());
            }
            r.longest_silence_ms = silence.as_secs_f64() * 1000.0;
            r
        })
    }
}

impl Drop for CounterClient {
    fn drop(&mut self) {
        // Ends the reader; a connection that is gone already is fine.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read_lines(stream: &TcpStream, journal: &Journal<Arrival>) -> String {
    let mut reader = BufReader::new(stream);
    let mut text = String::new();
    loop {
        text.clear();
        match reader.read_line(&mut text) {
            Ok(0) => return "the guest closed the connection".into(),
            Err(e) => return e.to_string(),
            Ok(_) => {}
        }
        let at = Instant::now();
        match text.parse() {
            Ok(line) => journal.push(Arrival { at, line }),
            Err(e) => return format!("not a counter line: {e}"),
        }
    }
}
