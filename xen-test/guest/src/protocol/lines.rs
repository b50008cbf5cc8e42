//! Counter lines, echo and beacon messages.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use super::BadLine;

/// Largest padded line or datagram payload, in bytes: one UDP datagram.
pub const MAX_PAYLOAD: usize = 60_000;

/// `rate HZ payload BYTES`: what a counter client asks for, as its first line
/// and again whenever it wants a change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Lines per second, 0 (silence) to 100,000.
    pub hz: f64,
    /// Length of each line with its newline; a line longer than that anyway
    /// is not cut. At most [`MAX_PAYLOAD`].
    pub payload: usize,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rate {} payload {}", self.hz, self.payload)
    }
}

impl FromStr for Rate {
    type Err = BadLine;

    fn from_str(s: &str) -> Result<Self, BadLine> {
        let bad = || BadLine::new("rate HZ payload BYTES", s);
        let mut words = s.split_ascii_whitespace();
        let (Some("rate"), Some(hz), Some("payload"), Some(payload), None) =
            (words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            return Err(bad());
        };
        let hz: f64 = hz.parse().map_err(|_| bad())?;
        let payload: usize = payload.parse().map_err(|_| bad())?;
        if !(0.0..=100_000.0).contains(&hz) || payload > MAX_PAYLOAD {
            return Err(bad());
        }
        Ok(Self { hz, payload })
    }
}

/// `N T [padding]`: one line of the counter server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterLine {
    /// Starts at 1 on each connection and grows by exactly 1.
    pub n: u64,
    /// The guest's `CLOCK_MONOTONIC` in nanoseconds.
    pub t_ns: u64,
}

impl CounterLine {
    /// The line with its newline, padded with dots to `payload` bytes.
    pub fn padded(&self, payload: usize) -> String {
        pad(format!("{} {}", self.n, self.t_ns), payload)
    }
}

impl FromStr for CounterLine {
    type Err = BadLine;

    fn from_str(s: &str) -> Result<Self, BadLine> {
        let bad = || BadLine::new("N T", s);
        let mut words = s.split_ascii_whitespace();
        let n = number(words.next()).ok_or_else(bad)?;
        let t_ns = number(words.next()).ok_or_else(bad)?;
        if words.any(|w| w.bytes().any(|b| b != b'.')) {
            return Err(bad());
        }
        Ok(Self { n, t_ns })
    }
}

/// One message of the echo services (a line over TCP, a datagram over UDP) or
/// of the beacon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram {
    /// `echo SEQ`: a request.
    Echo {
        /// The client's sequence number.
        seq: u64,
    },
    /// `answer SEQ COUNT T`: the answer to a request.
    Answer {
        /// The request's sequence number.
        seq: u64,
        /// How many answers this guest has made since boot, this one counted:
        /// tells in which epoch the answer was made.
        count: u64,
        /// The guest's `CLOCK_MONOTONIC` in nanoseconds.
        t_ns: u64,
    },
    /// `beacon N T`: sent unprompted.
    Beacon {
        /// Starts at 1 and grows by exactly 1 for each beacon order.
        n: u64,
        /// The guest's `CLOCK_MONOTONIC` in nanoseconds.
        t_ns: u64,
    },
}

impl Datagram {
    /// The text with its newline, padded with dots to `payload` bytes.
    pub fn padded(&self, payload: usize) -> String {
        pad(self.to_string(), payload)
    }
}

impl fmt::Display for Datagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Echo { seq } => write!(f, "echo {seq}"),
            Self::Answer { seq, count, t_ns } => write!(f, "answer {seq} {count} {t_ns}"),
            Self::Beacon { n, t_ns } => write!(f, "beacon {n} {t_ns}"),
        }
    }
}

impl FromStr for Datagram {
    type Err = BadLine;

    fn from_str(s: &str) -> Result<Self, BadLine> {
        let bad = || BadLine::new("echo SEQ, answer SEQ COUNT T or beacon N T", s);
        let mut words = s.split_ascii_whitespace();
        let kind = words.next();
        let mut next = || number(words.next()).ok_or_else(bad);
        let it = match kind {
            Some("echo") => Self::Echo { seq: next()? },
            Some("answer") => Self::Answer { seq: next()?, count: next()?, t_ns: next()? },
            Some("beacon") => Self::Beacon { n: next()?, t_ns: next()? },
            _ => return Err(bad()),
        };
        if words.any(|w| w.bytes().any(|b| b != b'.')) {
            return Err(bad());
        }
        Ok(it)
    }
}

fn number(word: Option<&str>) -> Option<u64> {
    // u64::from_str also takes "+5", which no peer of ours writes.
    word.filter(|w| w.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

fn pad(mut text: String, payload: usize) -> String {
    if text.len() + 2 < payload {
        let dots = payload - text.len() - 2;
        let _ = write!(text, " {:.<dots$}", "");
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_back_as_written_whatever_the_padding() {
        for payload in [0, 1, 20, 21, 22, 23, 1000] {
            let line = CounterLine { n: 7, t_ns: 123_456_789 };
            let text = line.padded(payload);
            assert!(text.ends_with('\n'));
            assert!(text.len() >= payload.min(MAX_PAYLOAD) || payload < 15, "{payload}: {text:?}");
            assert!(payload < 15 || text.len() == payload || text.len() == payload - 1, "{payload}: {text:?}");
            assert_eq!(text.parse(), Ok(line));
            for d in [
                Datagram::Echo { seq: 1 },
                Datagram::Answer { seq: 1, count: 2, t_ns: u64::MAX },
                Datagram::Beacon { n: 3, t_ns: 4 },
            ] {
                assert_eq!(d.padded(payload).parse(), Ok(d));
            }
        }
    }

    #[test]
    fn damaged_lines_are_refused() {
        for bad in ["", "7", "7 x", "x 7", "-7 8", "+7 8", "7 8 ..x", "7 8 9", "99999999999999999999 1"] {
            assert!(bad.parse::<CounterLine>().is_err(), "{bad:?}");
        }
        for bad in ["", "echo", "echo x", "answer 1 2", "beacon 1", "beacon 1 2 3", "noise 1 2"] {
            assert!(bad.parse::<Datagram>().is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "rate",
            "rate 5",
            "rate 5 payload",
            "rate -1 payload 5",
            "rate nan payload 5",
            "rate 5 payload 5 5",
            "rate 5 payload 99999999",
        ] {
            assert!(bad.parse::<Rate>().is_err(), "{bad:?}");
        }
        assert_eq!("rate 0.5 payload 100".parse(), Ok(Rate { hz: 0.5, payload: 100 }));
    }
}
