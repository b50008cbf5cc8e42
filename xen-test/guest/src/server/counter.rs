//! TCP: counter lines at the rate the client asks for.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::clock::monotonic_ns;
use crate::protocol::{CounterLine, Rate};

/// Longest request line.
const MAX_REQUEST: usize = 256;

/// Serves one connection until the client closes it or sends nonsense.
pub(super) fn serve(mut stream: &TcpStream) -> io::Result<()> {
    let mut rate = Rate { hz: 0.0, payload: 0 };
    let mut request = Vec::new();
    let mut n = 0;
    let mut due = Instant::now();
    loop {
        let wait = (rate.hz > 0.0).then(|| due.saturating_duration_since(Instant::now()));
        if readable(stream, wait)? {
            let mut chunk = [0; MAX_REQUEST];
            let got = stream.read(&mut chunk)?;
            if got == 0 {
                return Ok(());
            }
            request.extend_from_slice(&chunk[..got]);
            while let Some(end) = request.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = request.drain(..=end).collect();
                match String::from_utf8_lossy(&line).trim().parse() {
                    Ok(r) => rate = r,
                    Err(e) => return writeln!(stream, "error {e}"),
                }
                due = Instant::now();
            }
            if request.len() > MAX_REQUEST {
                return writeln!(stream, "error line too long");
            }
            continue;
        }
        if rate.hz == 0.0 {
            continue;
        }
        n += 1;
        stream.write_all(CounterLine { n, t_ns: monotonic_ns() }.padded(rate.payload).as_bytes())?;
        let step = Duration::from_secs_f64(1.0 / rate.hz);
        due += step;
        let now = Instant::now();
        if due + step < now {
            // Late, perhaps because the client did not read: no burst.
            due = now;
        }
    }
}

/// Waits until there is something to read (true) or the time is up (false).
fn readable(stream: &TcpStream, timeout: Option<Duration>) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut fds, timeout.map(TimeSpec::from), None) {
        Ok(n) => Ok(n > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
