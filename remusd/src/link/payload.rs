//! Layouts of the payloads, version 3. docs/protocol.md has them as a table.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    error::FrameError,
    frame::{
        EpochEnd, ErrorCode, Frame, FrameType, GuestState, GuestType, Heartbeat, Hello, LostReason,
        MAX_PAGES_PER_FRAME, MAX_RECORD, OnPrimaryLoss, ProtectOffer, Purpose, QueryEntry, RefuseCode, Role, StatePart,
        StopReason, VersionRange, Welcome,
    },
    token::{RecordKey, Token},
    wire::{Field, Fields, put_bool, put_option, put_text},
};
use crate::{
    audit::{MAX_PAGES, Sample},
    ids::{DomId, Epoch, Generation, Nonce},
    stream::{Layer, PAGE_SIZE, PageBatch, digest::EpochDigest},
};

/// How a page's contents are encoded. Values above [`encoding::RAW`] are reserved for a later codec.
pub(super) mod encoding {
    /// The entry's type carries no contents.
    pub(in crate::link) const NONE: u8 = 0;
    /// All bytes are zero; nothing follows.
    pub(in crate::link) const ZERO: u8 = 1;
    /// The page's bytes follow.
    pub(in crate::link) const RAW: u8 = 2;
}

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Appends the frame's payload.
pub(super) fn put(frame: &Frame, out: &mut BytesMut) -> Result<(), FrameError> {
    match frame {
        Frame::Hello(hello) => put_hello(hello, out),
        Frame::Welcome(welcome) => {
            out.put_u16_le(welcome.version);
            out.put_u64_le(welcome.capabilities);
            put_text(out, &welcome.software);
            put_text(out, &welcome.host);
            out.put_u64_le(welcome.wall_clock_ms);
            out.put_slice(welcome.host_id.as_bytes());
            put_bool(out, welcome.knows_record);
        }
        Frame::Refuse { code, text } => {
            out.put_u16_le(*code as u16);
            put_text(out, text);
        }
        Frame::QueryResult(entries) => {
            out.put_u32_le(entries.len() as u32);
            for entry in entries {
                out.put_slice(entry.protection.as_bytes());
                out.put_u8(entry.role as u8);
                out.put_u64_le(entry.generation.0);
                put_option(out, entry.acked, |out, epoch| out.put_u64_le(epoch.0));
                put_option(out, entry.domid, |out, domid| out.put_u32_le(domid.0));
            }
        }
        Frame::Challenge { nonce } | Frame::ChallengeAnswer { nonce } => out.put_slice(nonce.0.as_bytes()),
        Frame::Config(bytes) | Frame::Preamble(bytes) => out.put_slice(bytes),
        Frame::EpochBegin { epoch, armed } => {
            out.put_u64_le(epoch.0);
            put_bool(out, *armed);
        }
        Frame::Pages { epoch, batch } => put_pages(*epoch, batch, out)?,
        Frame::State(part) => {
            out.put_u64_le(part.epoch.0);
            out.put_u8(match part.layer {
                Layer::Libxc => 1,
                Layer::Libxl => 2,
            });
            out.put_u32_le(part.kind);
            out.put_u32_le(part.total);
            out.put_u32_le(part.offset);
            out.put_slice(&part.data);
        }
        Frame::EpochEnd(end) => {
            out.put_u64_le(end.epoch.0);
            put_bool(out, end.armed);
            out.put_u128_le(end.digest.0);
            out.put_u64_le(end.pages);
            out.put_u64_le(end.bytes);
            out.put_u32_le(end.records);
        }
        Frame::Ack { epoch, backlog_epochs, backlog_bytes } => {
            out.put_u64_le(epoch.0);
            out.put_u32_le(*backlog_epochs);
            out.put_u64_le(*backlog_bytes);
        }
        Frame::Heartbeat(beat) => {
            out.put_u64_le(beat.epoch.0);
            out.put_u8(beat.guest as u8);
            out.put_u64_le(beat.since_resume_ms);
            out.put_u64_le(beat.wall_clock_ms);
            put_bool(out, beat.late);
            out.put_u32_le(beat.heard_ms);
        }
        Frame::CodedPages { epoch, body } => {
            out.put_u64_le(epoch.0);
            out.put_slice(body);
        }
        Frame::Audit(sample) => {
            out.put_u64_le(sample.epoch.0);
            out.put_u16_le(sample.pages.len().min(MAX_PAGES) as u16);
            for (gfn, hash) in sample.pages.iter().take(MAX_PAGES) {
                out.put_u64_le(*gfn);
                out.put_u128_le(*hash);
            }
        }
        Frame::Stop { reason } => out.put_u16_le(*reason as u16),
        Frame::Stopped => {}
        Frame::BackupLost { reason, text } => {
            out.put_u16_le(*reason as u16);
            put_text(out, text);
        }
        Frame::Superseded { text } | Frame::HandoverFailed { text } => put_text(out, text),
        Frame::Handover { epoch, token } => {
            out.put_u64_le(epoch.0);
            put_token(*token, out);
        }
        Frame::Token { seq, token } => {
            out.put_u64_le(*seq);
            put_token(*token, out);
        }
        Frame::TokenAck { seq } => out.put_u64_le(*seq),
        Frame::Error { code, text } => {
            out.put_u16_le(*code as u16);
            put_text(out, text);
        }
    }
    Ok(())
}

fn put_token(token: Token, out: &mut BytesMut) {
    put_option(out, token.record(), |out, key| {
        out.put_u64_le(key.generation.0);
        out.put_slice(key.nonce.0.as_bytes());
    });
}

fn read_token(from: &mut Fields) -> Field<Token> {
    let key = |from: &mut Fields| Ok(RecordKey { generation: Generation(from.u64()?), nonce: Nonce(from.uuid()?) });
    Ok(from.option(key)?.map_or(Token::Primary, Token::Witness))
}

fn put_hello(hello: &Hello, out: &mut BytesMut) {
    out.put_u16_le(hello.versions.min);
    out.put_u16_le(hello.versions.max);
    out.put_u64_le(hello.capabilities);
    put_text(out, &hello.software);
    put_text(out, &hello.host);
    match &hello.purpose {
        Purpose::Protect(offer) => {
            out.put_u8(1);
            out.put_slice(offer.protection.as_bytes());
            put_text(out, &offer.domain);
            out.put_u64_le(offer.max_memory_kib);
            out.put_u32_le(offer.vcpus);
            out.put_u8(match offer.guest_type {
                GuestType::Pvh => 1,
                GuestType::Hvm => 2,
            });
            out.put_u8(match offer.on_primary_loss {
                OnPrimaryLoss::Wait => 0,
                OnPrimaryLoss::Activate => 1,
            });
            out.put_u32_le(offer.detection_ms);
            out.put_slice(offer.host_id.as_bytes());
            put_option(out, offer.witness.as_ref(), |out, text| put_text(out, text));
            put_option(out, offer.then.as_ref(), |out, text| put_text(out, text));
            put_bool(out, offer.no_monitor);
        }
        Purpose::Query { protection } => {
            out.put_u8(2);
            put_option(out, *protection, |out, id| out.put_slice(id.as_bytes()));
        }
    }
}

fn put_pages(epoch: Epoch, batch: &PageBatch, out: &mut BytesMut) -> Result<(), FrameError> {
    let malformed = |what| FrameError::Malformed { kind: FrameType::Pages.name(), what };
    if batch.entries.len() > MAX_PAGES_PER_FRAME {
        return Err(malformed("it has too many pages"));
    }
    if batch.data.len() != batch.data_pages() * PAGE_SIZE {
        return Err(malformed("contents and entries do not agree"));
    }
    out.put_u64_le(epoch.0);
    out.put_u32_le(batch.entries.len() as u32);
    for entry in &batch.entries {
        out.put_u64_le(*entry);
    }
    // The encodings stand together before the contents, so that contents of an all-raw frame need no copy when read.
    let encodings_at = out.len();
    out.put_bytes(encoding::NONE, batch.entries.len());
    let mut contents = batch.data.chunks_exact(PAGE_SIZE);
    for (index, entry) in batch.entries.iter().enumerate() {
        if !PageBatch::has_data(*entry) {
            continue;
        }
        let Some(page) = contents.next() else { break };
        if page == ZERO_PAGE {
            out[encodings_at + index] = encoding::ZERO;
        } else {
            out[encodings_at + index] = encoding::RAW;
            out.put_slice(page);
        }
    }
    Ok(())
}

/// Reads a payload of the given type.
pub(super) fn get(kind: FrameType, payload: Bytes) -> Result<Frame, FrameError> {
    let mut fields = Fields(payload);
    read(kind, &mut fields)
        .and_then(|frame| fields.end().map(|()| frame))
        .map_err(|what| FrameError::Malformed { kind: kind.name(), what })
}

fn read(kind: FrameType, from: &mut Fields) -> Field<Frame> {
    Ok(match kind {
        FrameType::Hello => Frame::Hello(read_hello(from)?),
        FrameType::Welcome => Frame::Welcome(Welcome {
            version: from.u16()?,
            capabilities: from.u64()?,
            software: from.text()?,
            host: from.text()?,
            wall_clock_ms: from.u64()?,
            host_id: from.uuid()?,
            knows_record: from.bool()?,
        }),
        FrameType::Refuse => {
            Frame::Refuse { code: code(from.u16()?, &RefuseCode::ALL, |c| c as u16)?, text: from.text()? }
        }
        FrameType::QueryResult => {
            let count = from.u32()?;
            let mut entries = Vec::new();
            for _ in 0..count {
                entries.push(QueryEntry {
                    protection: from.uuid()?,
                    role: code(from.u8()?, &Role::ALL, |c| c as u8)?,
                    generation: Generation(from.u64()?),
                    acked: from.option(|f| f.u64().map(Epoch))?,
                    domid: from.option(|f| f.u32().map(DomId))?,
                });
            }
            Frame::QueryResult(entries)
        }
        FrameType::Challenge => Frame::Challenge { nonce: Nonce(from.uuid()?) },
        FrameType::ChallengeAnswer => Frame::ChallengeAnswer { nonce: Nonce(from.uuid()?) },
        FrameType::Config => Frame::Config(from.rest()),
        FrameType::Preamble => Frame::Preamble(from.rest()),
        FrameType::EpochBegin => Frame::EpochBegin { epoch: Epoch(from.u64()?), armed: from.bool()? },
        FrameType::Pages => {
            let epoch = Epoch(from.u64()?);
            Frame::Pages { epoch, batch: read_pages(from)? }
        }
        FrameType::State => Frame::State(read_state(from)?),
        FrameType::EpochEnd => Frame::EpochEnd(EpochEnd {
            epoch: Epoch(from.u64()?),
            armed: from.bool()?,
            digest: EpochDigest(from.u128()?),
            pages: from.u64()?,
            bytes: from.u64()?,
            records: from.u32()?,
        }),
        FrameType::Ack => {
            Frame::Ack { epoch: Epoch(from.u64()?), backlog_epochs: from.u32()?, backlog_bytes: from.u64()? }
        }
        FrameType::Heartbeat => Frame::Heartbeat(Heartbeat {
            epoch: Epoch(from.u64()?),
            guest: code(from.u8()?, &GuestState::ALL, |c| c as u8)?,
            since_resume_ms: from.u64()?,
            wall_clock_ms: from.u64()?,
            late: from.bool()?,
            heard_ms: from.u32()?,
        }),
        FrameType::CodedPages => {
            let epoch = Epoch(from.u64()?);
            Frame::CodedPages { epoch, body: from.rest() }
        }
        FrameType::Audit => {
            let epoch = Epoch(from.u64()?);
            let count = usize::from(from.u16()?);
            if count > MAX_PAGES {
                return Err("a sample has too many pages");
            }
            let pages = (0..count).map(|_| Ok((from.u64()?, from.u128()?))).collect::<Field<_>>()?;
            Frame::Audit(Sample { epoch, pages })
        }
        FrameType::Stop => Frame::Stop { reason: code(from.u16()?, &StopReason::ALL, |c| c as u16)? },
        FrameType::Stopped => Frame::Stopped,
        FrameType::BackupLost => {
            Frame::BackupLost { reason: code(from.u16()?, &LostReason::ALL, |c| c as u16)?, text: from.text()? }
        }
        FrameType::Superseded => Frame::Superseded { text: from.text()? },
        FrameType::Handover => Frame::Handover { epoch: Epoch(from.u64()?), token: read_token(from)? },
        FrameType::HandoverFailed => Frame::HandoverFailed { text: from.text()? },
        FrameType::Token => Frame::Token { seq: from.u64()?, token: read_token(from)? },
        FrameType::TokenAck => Frame::TokenAck { seq: from.u64()? },
        FrameType::Error => {
            Frame::Error { code: code(from.u16()?, &ErrorCode::ALL, |c| c as u16)?, text: from.text()? }
        }
    })
}

fn code<N: PartialEq + Copy, T: Copy>(found: N, all: &[T], number: impl Fn(T) -> N) -> Field<T> {
    all.iter().copied().find(|value| number(*value) == found).ok_or("it has an unknown code")
}

fn read_hello(from: &mut Fields) -> Field<Hello> {
    let versions = VersionRange { min: from.u16()?, max: from.u16()? };
    if versions.min > versions.max {
        return Err("its version range is empty");
    }
    Ok(Hello {
        versions,
        capabilities: from.u64()?,
        software: from.text()?,
        host: from.text()?,
        purpose: match from.u8()? {
            1 => Purpose::Protect(ProtectOffer {
                protection: from.uuid()?,
                domain: from.text()?,
                max_memory_kib: from.u64()?,
                vcpus: from.u32()?,
                guest_type: match from.u8()? {
                    1 => GuestType::Pvh,
                    2 => GuestType::Hvm,
                    _ => return Err("its guest type is unknown"),
                },
                on_primary_loss: match from.u8()? {
                    0 => OnPrimaryLoss::Wait,
                    1 => OnPrimaryLoss::Activate,
                    _ => return Err("its policy on primary loss is unknown"),
                },
                detection_ms: from.u32()?,
                host_id: from.uuid()?,
                witness: from.option(Fields::text)?,
                then: from.option(Fields::text)?,
                no_monitor: from.bool()?,
            }),
            2 => Purpose::Query { protection: from.option(Fields::uuid)? },
            _ => return Err("its purpose is unknown"),
        },
    })
}

fn read_state(from: &mut Fields) -> Field<StatePart> {
    let epoch = Epoch(from.u64()?);
    let layer = match from.u8()? {
        1 => Layer::Libxc,
        2 => Layer::Libxl,
        _ => return Err("its layer is unknown"),
    };
    let (kind, total, offset) = (from.u32()?, from.u32()?, from.u32()?);
    let data = from.rest();
    if total as usize > MAX_RECORD {
        return Err("its record is too long");
    }
    if offset as usize + data.len() > total as usize {
        return Err("it lies outside of its record");
    }
    if data.is_empty() && total != 0 {
        return Err("it is empty");
    }
    Ok(StatePart { epoch, layer, kind, total, offset, data })
}

fn read_pages(from: &mut Fields) -> Field<PageBatch> {
    let count = from.u32()? as usize;
    if count > MAX_PAGES_PER_FRAME {
        return Err("it has too many pages");
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(from.u64()?);
    }
    let encodings = from.take(count)?;
    let (mut raw, mut zero) = (0, 0);
    for (entry, encoding) in entries.iter().zip(&encodings) {
        match (PageBatch::has_data(*entry), *encoding) {
            (false, encoding::NONE) => {}
            (true, encoding::RAW) => raw += 1,
            (true, encoding::ZERO) => zero += 1,
            (true, encoding::NONE) | (false, encoding::RAW | encoding::ZERO) => {
                return Err("a page's encoding does not fit its type");
            }
            _ => return Err("a page has an unknown encoding"),
        }
    }
    let contents = from.take(raw * PAGE_SIZE)?;
    if zero == 0 {
        return Ok(PageBatch { entries, data: contents });
    }
    let mut data = BytesMut::with_capacity((raw + zero) * PAGE_SIZE);
    let mut pages = contents.chunks_exact(PAGE_SIZE);
    for encoding in &encodings {
        match *encoding {
            encoding::RAW => data.put_slice(pages.next().ok_or("it is too short")?),
            encoding::ZERO => data.put_slice(&ZERO_PAGE),
            _ => {}
        }
    }
    Ok(PageBatch { entries, data: data.freeze() })
}
