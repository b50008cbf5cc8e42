//! The thread that takes the helper's stream out of its pipe.
//!
//! Each record is read into a buffer of its own, once; pages are slices of it.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc::Receiver;

use bytes::Bytes;

use super::CaptureError;
use super::buffer::Shared;
use crate::ids::DomId;
use crate::stream::libxc::{LibxcEvent, LibxcParser};
use crate::stream::{Pull, StreamError};

/// Bytes reserved at once for a record; longer ones grow as they come, so that a wrong length costs nothing.
const RESERVE: usize = 8 << 20;

/// Bytes thrown away at a time.
const WASTE: u64 = 1 << 20;

/// Reads the stream to its end and queues what it holds; ends the queue. Blocks. When items are no longer wanted it goes on reading,
/// so that the helper never waits for us; when the helper is to stop, it closes the pipe, so that its next write fails.
///
/// Does not return before `released` is closed: the end of this thread ends the helper.
pub(super) fn drain(domid: DomId, mut pipe: File, shared: &Shared, released: &Receiver<()>) {
    let outcome = parse(domid, &mut pipe, shared);
    shared.end(outcome.err());
    while !shared.closing() {
        match std::io::copy(&mut Read::by_ref(&mut pipe).take(WASTE), &mut std::io::sink()) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    drop(pipe);
    let _ = released.recv();
}

fn parse(domid: DomId, pipe: &mut File, shared: &Shared) -> Result<(), CaptureError> {
    let mut parser = LibxcParser::new();
    let mut events = Vec::new();
    let mut wanted = true;
    loop {
        let need = parser.need();
        if need == 0 || shared.closing() {
            return Ok(());
        }
        let bytes = read(pipe, need).map_err(|error| CaptureError::Io {
            domid,
            doing: "reading its stream",
            cause: error.to_string(),
        })?;
        shared.count(bytes.len());
        if bytes.len() < need {
            return match parser.within() {
                None if bytes.is_empty() => Ok(()),
                within => Err(CaptureError::Stream {
                    domid,
                    cause: StreamError::Truncated { within: within.unwrap_or("a record's head") },
                }),
            };
        }
        parser.take(bytes, &mut events).map_err(|cause| CaptureError::Stream { domid, cause })?;
        for event in events.drain(..) {
            if let LibxcEvent::Item(item) = event
                && wanted
            {
                wanted = shared.push(item);
            }
        }
    }
}

/// Reads `need` bytes, less at the end of the stream. Into fresh memory without clearing it first.
fn read(pipe: &mut File, need: usize) -> std::io::Result<Bytes> {
    let mut buffer = Vec::with_capacity(need.min(RESERVE));
    pipe.take(need as u64).read_to_end(&mut buffer)?;
    Ok(Bytes::from(buffer))
}
