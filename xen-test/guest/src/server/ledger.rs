//! TCP: one entry of the ledger for each line with its number, answered with the same line once its transaction is complete.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;

use super::Guest;

/// Longest request line.
const MAX_REQUEST: u64 = 64;

/// Serves one connection until the client closes it; an entry that cannot be made ends it with the reason.
pub(super) fn serve(mut stream: &TcpStream, guest: &Guest) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if io::Read::take(&mut reader, MAX_REQUEST).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let Ok(n) = line.trim().parse() else {
            return writeln!(stream, "error expected the number of an entry, got {line:?}");
        };
        match guest.ledger.put(n) {
            Ok(n) => stream.write_all(format!("{n}\n").as_bytes())?,
            Err(error) => return writeln!(stream, "error {error}"),
        }
    }
}
