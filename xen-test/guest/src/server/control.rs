//! The control port.

use std::fmt::Display;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;

use serde::Serialize;

use super::{End, Guest, mem_kb};
use crate::clock::monotonic_ns;
use crate::protocol::{Command, Hello, Reply};

/// Longest command line.
const MAX_COMMAND: u64 = 1024;

pub(super) fn serve(mut stream: &TcpStream, guest: &Guest) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if io::Read::take(&mut reader, MAX_COMMAND).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let (text, end) = match line.trim().parse() {
            Ok(command) => (run(&command, guest), ending(&command)),
            Err(e) => (error(e), None),
        };
        stream.write_all(text.as_bytes())?;
        if let Some(end) = end {
            (guest.end)(end);
        }
    }
}

fn ending(command: &Command) -> Option<End> {
    match command {
        Command::Poweroff => Some(End::Poweroff),
        Command::Reboot => Some(End::Reboot),
        Command::Crash => Some(End::Crash),
        _ => None,
    }
}

fn run(command: &Command, guest: &Guest) -> String {
    match command {
        Command::Hello | Command::Poweroff | Command::Reboot | Command::Crash => {
            ok(&Hello { id: guest.id.clone(), t_ns: monotonic_ns() })
        }
        Command::Mem => ok(&mem_kb()),
        Command::Dirty(spec) => reply(guest.dirtier.order(*spec)),
        Command::DirtyInfo => ok(&guest.dirtier.info()),
        Command::Verify => reply(guest.dirtier.verify()),
        Command::DiskStart(spec) => reply(guest.disk.start(spec)),
        Command::DiskRead => reply(guest.disk.info()),
        Command::DiskVerify => reply(guest.disk.verify()),
        Command::LedgerOpen { device } => reply(guest.ledger.open(device)),
        Command::LedgerCheck => reply(guest.ledger.check()),
        Command::LedgerClose => reply(guest.ledger.close()),
        Command::StallStart { threshold_ms } => reply(guest.stalls.start(*threshold_ms)),
        Command::StallRead { reset } => reply(guest.stalls.read(*reset).ok_or(NOT_STARTED)),
        Command::StallStop => reply(guest.stalls.stop().ok_or(NOT_STARTED)),
        Command::WorkStart => reply(guest.work.start()),
        Command::WorkRead => ok(&guest.work.read()),
        Command::WorkStop => ok(&guest.work.stop()),
        Command::Beacon(spec) => reply(guest.beacons.order(*spec)),
        Command::BeaconStop => ok(&guest.beacons.stop()),
    }
}

const NOT_STARTED: &str = "the stall meter was never started: send stall start MS first";

fn reply<T: Serialize, E: Display>(result: Result<T, E>) -> String {
    result.map_or_else(error, |it| ok(&it))
}

fn ok<T: Serialize>(it: &T) -> String {
    to_line(&Reply::Ok(it))
}

fn error(e: impl Display) -> String {
    to_line(&Reply::<()>::Error(e.to_string()))
}

fn to_line<T: Serialize>(reply: &Reply<T>) -> String {
    // Plain structs of numbers and strings always serialise.
    let mut text = serde_json::to_string(reply).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
    text.push('\n');
    text
}
