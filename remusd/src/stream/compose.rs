//! Writing streams that stock receivers take.

use bytes::{Bytes, BytesMut};

use super::error::StreamError;
use super::item::{Layer, PageBatch, Record};
use super::libxc::{self, put_record};
use super::{libxl, save_file};

/// Composes the stream for a stock plain `xl migrate-receive`: [`head`](Self::head) once, [`pages`](Self::pages) for each
/// batch of each acknowledged epoch, and only at activation [`tail`](Self::tail) with the newest epoch's state. Until then the end
/// of the pipe makes the receiver destroy what it has; after the tail it says
/// [`READY`](super::handshake::READY) and waits for [`GO`](super::handshake::GO).
pub struct PlainComposer;

impl PlainComposer {
    /// xl's head, the libxl header, LIBXC_CONTEXT and the preamble.
    ///
    /// # Errors
    /// [`StreamError::Config`] when the configuration is not libxl's JSON.
    pub fn head(config_json: &str, preamble: &Bytes) -> Result<Vec<Bytes>, StreamError> {
        opening(config_json, preamble)
    }

    /// One `PAGE_DATA` record; nothing for an empty batch.
    ///
    /// # Errors
    /// [`StreamError::TooLong`] for a batch above 128 MiB.
    pub fn pages(batch: &PageBatch) -> Result<Vec<Bytes>, StreamError> {
        pages(batch)
    }

    /// The newest epoch's state in the order that libxl sends it: libxc's state, libxc END, the device model's keys and state, END.
    #[must_use]
    pub fn tail(state: &[Record]) -> Bytes {
        let mut buffer = BytesMut::new();
        put_layer(&mut buffer, state, Layer::Libxc);
        put_record(&mut buffer, libxc::kind::END, &[]);
        put_emulator(&mut buffer, state);
        put_record(&mut buffer, libxl::kind::END, &[]);
        buffer.freeze()
    }
}

/// Composes the stream for a stock `xl migrate-receive -r`: [`head`](Self::head) once, then for each epoch its
/// [`pages`](Self::pages) and [`end_of_epoch`](Self::end_of_epoch). That receiver starts the guest at any end of the pipe after the
/// first whole epoch: the named, unsafe interoperation mode.
pub struct RemusComposer;

impl RemusComposer {
    /// As [`PlainComposer::head`].
    ///
    /// # Errors
    /// As [`PlainComposer::head`].
    pub fn head(config_json: &str, preamble: &Bytes) -> Result<Vec<Bytes>, StreamError> {
        opening(config_json, preamble)
    }

    /// As [`PlainComposer::pages`].
    ///
    /// # Errors
    /// As [`PlainComposer::pages`].
    pub fn pages(batch: &PageBatch) -> Result<Vec<Bytes>, StreamError> {
        pages(batch)
    }

    /// The epoch's state: libxc's state, CHECKPOINT, the device model's keys and state, CHECKPOINT_END.
    #[must_use]
    pub fn end_of_epoch(state: &[Record]) -> Bytes {
        let mut buffer = BytesMut::new();
        put_layer(&mut buffer, state, Layer::Libxc);
        put_record(&mut buffer, libxc::kind::CHECKPOINT, &[]);
        put_emulator(&mut buffer, state);
        put_record(&mut buffer, libxl::kind::CHECKPOINT_END, &[]);
        buffer.freeze()
    }

    /// What makes the receiver give its copy up instead of starting it: a checkpoint whose device-model part holds a record that
    /// libxl does not know (`libxl_stream_read.c` of Xen 4.17: unbuffering fails, the restore fails, the domain is destroyed).
    /// Only at a record boundary, after the first whole epoch.
    #[must_use]
    pub fn poison() -> Bytes {
        let mut buffer = BytesMut::new();
        put_record(&mut buffer, libxc::kind::CHECKPOINT, &[]);
        put_record(&mut buffer, 0x7fff_ffff, &[]);
        put_record(&mut buffer, libxl::kind::CHECKPOINT_END, &[]);
        buffer.freeze()
    }
}

fn opening(config_json: &str, preamble: &Bytes) -> Result<Vec<Bytes>, StreamError> {
    let config = save_file::config_for_receiver(config_json)?;
    Ok(vec![
        save_file::head(&config)?,
        libxl::header(),
        libxl::record(libxl::kind::LIBXC_CONTEXT, &[]),
        preamble.clone(),
    ])
}

fn pages(batch: &PageBatch) -> Result<Vec<Bytes>, StreamError> {
    if batch.entries.is_empty() {
        return Ok(Vec::new());
    }
    match libxc::page_record(batch) {
        Some(pieces) => Ok(pieces.to_vec()),
        None => Err(StreamError::TooLong {
            layer: Layer::Libxc,
            kind: libxc::kind::PAGE_DATA,
            length: batch.size() as u64,
            limit: libxc::RECORD_MAX as u64,
        }),
    }
}

fn put_layer(buffer: &mut BytesMut, state: &[Record], layer: Layer) {
    for record in state.iter().filter(|record| record.layer == layer) {
        put_record(buffer, record.kind, &record.body);
    }
}

/// libxl writes the keys before the state, whatever the order in which they were collected.
fn put_emulator(buffer: &mut BytesMut, state: &[Record]) {
    let mut records: Vec<&Record> = state.iter().filter(|record| record.layer == Layer::Libxl).collect();
    records.sort_by_key(|record| record.kind);
    for record in records {
        put_record(buffer, record.kind, &record.body);
    }
}
