//! Echo over TCP (lines) and UDP (datagrams): `echo SEQ` is answered with
//! `answer SEQ COUNT T`, padded to the request's length.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::atomic::Ordering;

use super::Guest;
use crate::clock::monotonic_ns;
use crate::protocol::{Datagram, MAX_PAYLOAD};

/// The answer to a request; `None` if it is none.
fn answer(request: &str, guest: &Guest) -> Option<String> {
    let Ok(Datagram::Echo { seq }) = request.parse() else {
        return None;
    };
    let count = guest.answers.fetch_add(1, Ordering::Relaxed) + 1;
    Some(Datagram::Answer { seq, count, t_ns: monotonic_ns() }.padded(request.len()))
}

pub(super) fn tcp(mut stream: &TcpStream, guest: &Guest) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        // `take` so that a peer without newlines cannot fill the memory.
        let got = io::Read::take(&mut reader, MAX_PAYLOAD as u64 + 1).read_line(&mut line)?;
        if got == 0 {
            return Ok(());
        }
        match answer(&line, guest) {
            Some(text) => stream.write_all(text.as_bytes())?,
            None => return writeln!(stream, "error expected echo SEQ"),
        }
    }
}

pub(super) fn udp(socket: &UdpSocket, guest: &Guest) {
    let mut buffer = vec![0; MAX_PAYLOAD + 1];
    loop {
        // Errors are those of earlier sends (port unreachable): not ours.
        let Ok((got, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let text = String::from_utf8_lossy(&buffer[..got]);
        if let Some(text) = answer(&text, guest) {
            let _ = socket.send_to(text.as_bytes(), from);
        }
    }
}
