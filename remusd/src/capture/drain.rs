//! The thread that takes the helper's stream out of its pipe.
//!
//! Each record is read into a buffer of its own, once; pages are slices of it.

use std::fs::File;
use std::io::Read;

use bytes::Bytes;

use super::CaptureError;
use super::buffer::Shared;
use crate::ids::DomId;
use crate::stream::libxc::{LibxcEvent, LibxcParser};
use crate::stream::{Pull, StreamError};

/// Bytes reserved at once for a record; longer ones grow as they come, so that a wrong length costs nothing.
const RESERVE: usize = 8 << 20;

/// Reads the stream to its end and queues what it holds; ends the queue. Blocks. Goes on reading, to throw away, when items are no
/// longer wanted: the helper must never wait for us then.
pub(super) fn drain(domid: DomId, mut pipe: File, shared: &Shared) {
    let outcome = parse(domid, &mut pipe, shared);
    let failed = outcome.is_err();
    shared.end(outcome.err());
    if failed {
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
    }
}

fn parse(domid: DomId, pipe: &mut File, shared: &Shared) -> Result<(), CaptureError> {
    let mut parser = LibxcParser::new();
    let mut events = Vec::new();
    let mut wanted = true;
    loop {
        let need = parser.need();
        if need == 0 {
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
