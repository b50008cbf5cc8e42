//! The inner stream: guest memory, vCPU and platform state (libxc-migration-stream, version 3).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::error::StreamError;
use super::item::{CaptureItem, Layer, PAGE_SIZE, PageBatch, Record};
use super::pull::Pull;

/// Record types.
pub mod kind {
    /// Last record of a plain stream.
    pub const END: u32 = 0;
    /// Page contents.
    pub const PAGE_DATA: u32 = 1;
    /// PV guest word size and page table levels (static).
    pub const X86_PV_INFO: u32 = 2;
    /// PV guest's p2m frames; once, before the first page.
    pub const X86_PV_P2M_FRAMES: u32 = 3;
    /// PV vCPU basic state.
    pub const X86_PV_VCPU_BASIC: u32 = 4;
    /// PV vCPU extended state.
    pub const X86_PV_VCPU_EXTENDED: u32 = 5;
    /// PV vCPU XSAVE state.
    pub const X86_PV_VCPU_XSAVE: u32 = 6;
    /// PV shared info page.
    pub const SHARED_INFO: u32 = 7;
    /// TSC mode and values.
    pub const X86_TSC_INFO: u32 = 8;
    /// Platform and vCPU state of an HVM or PVH guest.
    pub const HVM_CONTEXT: u32 = 9;
    /// HVM parameters.
    pub const HVM_PARAMS: u32 = 0xa;
    /// PV vCPU MSRs.
    pub const X86_PV_VCPU_MSRS: u32 = 0xc;
    /// End of an epoch in a Remus stream.
    pub const CHECKPOINT: u32 = 0xe;
    /// End of the static records.
    pub const STATIC_DATA_END: u32 = 0x10;
    /// CPUID policy (static).
    pub const X86_CPUID_POLICY: u32 = 0x11;
    /// MSR policy (static).
    pub const X86_MSR_POLICY: u32 = 0x12;
    /// Set in types that a reader may skip.
    pub const OPTIONAL: u32 = 0x8000_0000;
}

/// Longest body that the format allows.
pub const RECORD_MAX: usize = 128 << 20;
/// Most bytes of headers and static records; real ones have a few KiB (PV p2m frames: 4 KiB per GiB of guest).
pub const PREAMBLE_MAX: usize = 16 << 20;
/// Page count of the records that libxenguest writes.
pub const BATCH_PAGES: usize = 1024;

const IMAGE_HEADER: usize = 24;
const DOMAIN_HEADER: usize = 16;
const RECORD_HEADER: usize = 8;
const MARKER: u64 = u64::MAX;
const IMAGE_ID: u32 = 0x5845_4e46;
const VERSION: u32 = 3;
const DOMAIN_PV: u32 = 1;
const DOMAIN_HVM: u32 = 2;

/// Bytes of padding after a body of `length` bytes.
#[must_use]
pub(super) fn padding(length: usize) -> usize {
    length.wrapping_neg() & 7
}

/// What the parser yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibxcEvent {
    /// A piece of an epoch.
    Item(CaptureItem),
    /// The END record: nothing follows.
    End,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ImageHeader,
    DomainHeader,
    Head,
    Body { kind: u32, length: usize },
    Ended,
}

/// Parses an inner stream, plain or Remus.
#[derive(Debug)]
pub struct LibxcParser {
    state: State,
    pv: bool,
    /// Collected until the static part is over, then `None`.
    preamble: Option<BytesMut>,
    /// Since the last CHECKPOINT nothing has come.
    clean: bool,
}

impl Default for LibxcParser {
    fn default() -> Self {
        Self::new()
    }
}

impl LibxcParser {
    /// A parser that expects the image header.
    #[must_use]
    pub fn new() -> Self {
        Self { state: State::ImageHeader, pv: false, preamble: Some(BytesMut::new()), clean: false }
    }

    fn collect(&mut self, bytes: &[u8], kind: u32) -> Result<(), StreamError> {
        if let Some(preamble) = &mut self.preamble {
            let length = preamble.len() + bytes.len();
            if length > PREAMBLE_MAX {
                return Err(StreamError::TooLong {
                    layer: Layer::Libxc,
                    kind,
                    length: length as u64,
                    limit: PREAMBLE_MAX as u64,
                });
            }
            preamble.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn record_head(&mut self, bytes: &Bytes, out: &mut Vec<LibxcEvent>) -> Result<(), StreamError> {
        let mut head = bytes.clone();
        let kind = head.get_u32_le();
        let length = head.get_u32_le() as usize;
        if length > RECORD_MAX {
            return Err(too_long(kind, length));
        }
        self.clean = false;
        if self.preamble.is_some() {
            let fits = matches!(
                kind,
                kind::X86_PV_INFO | kind::X86_CPUID_POLICY | kind::X86_MSR_POLICY | kind::STATIC_DATA_END
            ) || (self.pv && kind == kind::X86_PV_P2M_FRAMES)
                || kind & kind::OPTIONAL != 0;
            if !fits {
                return Err(StreamError::Misplaced {
                    layer: Layer::Libxc,
                    kind,
                    place: "comes before the end of the static data; a stream of Xen 4.13 or older, or a damaged one",
                });
            }
            self.collect(bytes, kind)?;
        }
        if length == 0 {
            self.state = State::Head;
            return self.record(kind, Bytes::new(), out);
        }
        self.state = State::Body { kind, length };
        Ok(())
    }

    fn record(&mut self, kind: u32, body: Bytes, out: &mut Vec<LibxcEvent>) -> Result<(), StreamError> {
        if self.preamble.is_some() {
            let last = if self.pv { kind::X86_PV_P2M_FRAMES } else { kind::STATIC_DATA_END };
            if kind == last
                && let Some(preamble) = self.preamble.take()
            {
                out.push(LibxcEvent::Item(CaptureItem::Preamble(preamble.freeze())));
            }
            return Ok(());
        }
        let event = match kind {
            kind::PAGE_DATA => LibxcEvent::Item(CaptureItem::Pages(parse_pages(&body)?)),
            kind::CHECKPOINT | kind::END if !body.is_empty() => {
                return Err(malformed(kind, format!("{} bytes, must be empty", body.len())));
            }
            kind::CHECKPOINT => {
                self.clean = true;
                LibxcEvent::Item(CaptureItem::EndOfEpoch)
            }
            kind::END => {
                self.state = State::Ended;
                LibxcEvent::End
            }
            kind::X86_TSC_INFO
            | kind::HVM_CONTEXT
            | kind::HVM_PARAMS
            | kind::SHARED_INFO
            | kind::X86_PV_VCPU_BASIC
            | kind::X86_PV_VCPU_EXTENDED
            | kind::X86_PV_VCPU_XSAVE
            | kind::X86_PV_VCPU_MSRS => {
                LibxcEvent::Item(CaptureItem::State(Record { layer: Layer::Libxc, kind, body }))
            }
            kind::X86_PV_INFO
            | kind::X86_PV_P2M_FRAMES
            | kind::STATIC_DATA_END
            | kind::X86_CPUID_POLICY
            | kind::X86_MSR_POLICY => {
                return Err(StreamError::Misplaced {
                    layer: Layer::Libxc,
                    kind,
                    place: "comes after the end of the static data",
                });
            }
            optional if optional & kind::OPTIONAL != 0 => return Ok(()),
            unknown => {
                return Err(StreamError::Unknown { layer: Layer::Libxc, kind: unknown });
            }
        };
        out.push(event);
        Ok(())
    }
}

impl Pull for LibxcParser {
    type Out = LibxcEvent;

    fn need(&self) -> usize {
        match self.state {
            State::ImageHeader => IMAGE_HEADER,
            State::DomainHeader => DOMAIN_HEADER,
            State::Head => RECORD_HEADER,
            State::Body { length, .. } => length + padding(length),
            State::Ended => 0,
        }
    }

    fn take(&mut self, mut bytes: Bytes, out: &mut Vec<LibxcEvent>) -> Result<(), StreamError> {
        if bytes.len() != self.need() {
            return Err(StreamError::Truncated { within: "a piece of the libxc stream" });
        }
        match self.state {
            State::ImageHeader => {
                check_image_header(&bytes)?;
                self.collect(&bytes, 0)?;
                self.state = State::DomainHeader;
                Ok(())
            }
            State::DomainHeader => {
                self.pv = check_domain_header(&bytes)?;
                self.collect(&bytes, 0)?;
                self.state = State::Head;
                Ok(())
            }
            State::Head => self.record_head(&bytes, out),
            State::Body { kind, length } => {
                self.collect(&bytes, kind)?;
                self.state = State::Head;
                bytes.truncate(length);
                self.record(kind, bytes, out)
            }
            State::Ended => Ok(()),
        }
    }

    fn within(&self) -> Option<&'static str> {
        match self.state {
            State::ImageHeader => Some("the libxc image header"),
            State::DomainHeader => Some("the libxc domain header"),
            State::Head if self.clean => None,
            State::Head => Some("an epoch (the last record is whole)"),
            State::Body { .. } => Some("a libxc record"),
            State::Ended => None,
        }
    }
}

fn too_long(kind: u32, length: usize) -> StreamError {
    StreamError::TooLong { layer: Layer::Libxc, kind, length: length as u64, limit: RECORD_MAX as u64 }
}

fn malformed(kind: u32, reason: String) -> StreamError {
    StreamError::Malformed { layer: Layer::Libxc, kind, reason }
}

fn check_image_header(bytes: &Bytes) -> Result<(), StreamError> {
    let mut head = bytes.clone();
    let (marker, id, version, options) = (head.get_u64(), head.get_u32(), head.get_u32(), head.get_u16());
    if marker != MARKER || id != IMAGE_ID {
        return Err(StreamError::Magic { expected: "a libxc stream", found: format!("{marker:#x} {id:#x}") });
    }
    if version != VERSION {
        return Err(StreamError::Unsupported {
            feature: format!("libxc stream version {version} (this is version {VERSION}, Xen 4.14 and later)"),
        });
    }
    if options & 1 != 0 {
        return Err(StreamError::Unsupported { feature: "a big-endian stream".into() });
    }
    Ok(())
}

fn check_domain_header(bytes: &Bytes) -> Result<bool, StreamError> {
    let mut head = bytes.clone();
    let (guest, shift) = (head.get_u32_le(), head.get_u16_le());
    if shift != 12 {
        return Err(StreamError::Unsupported { feature: format!("pages of 2^{shift} bytes") });
    }
    match guest {
        DOMAIN_PV => Ok(true),
        DOMAIN_HVM => Ok(false),
        other => Err(StreamError::Unsupported { feature: format!("guest type {other}") }),
    }
}

/// Parses the body of a `PAGE_DATA` record; the contents are a slice of it, not a copy.
///
/// # Errors
/// [`StreamError::Malformed`] when counts and lengths do not agree.
pub fn parse_pages(body: &Bytes) -> Result<PageBatch, StreamError> {
    let bad = |reason: String| malformed(kind::PAGE_DATA, reason);
    if body.len() < 8 {
        return Err(bad(format!("{} bytes, at least 8 are needed", body.len())));
    }
    let mut rest = body.clone();
    let count = rest.get_u32_le() as usize;
    rest.advance(4);
    if count == 0 || rest.len() / 8 < count {
        return Err(bad(format!("{count} pages in {} bytes", body.len())));
    }
    let entries: Vec<u64> = rest.split_to(count * 8).chunks_exact(8).map(le_u64).collect();
    if let Some(entry) =
        entries.iter().find(|entry| !matches!(*entry >> 60, 0..=4 | 9..=0xf) || *entry & PFN_RESERVED != 0)
    {
        return Err(bad(format!("page entry {entry:#x}")));
    }
    let batch = PageBatch { entries, data: rest };
    let wanted = batch.data_pages() * PAGE_SIZE;
    if batch.data.len() != wanted {
        return Err(bad(format!("{} bytes of contents for {} pages, {wanted} expected", batch.data.len(), count)));
    }
    Ok(batch)
}

/// Bits of a page entry that mean nothing and must be clear.
const PFN_RESERVED: u64 = 0x0ff0_0000_0000_0000;

fn le_u64(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A `PAGE_DATA` record as two pieces to write in order: head with entries, and the batch's contents (not copied). Needs no
/// padding: all its parts are multiples of 8 bytes. `None` for a batch without entries, or one too big for a record.
#[must_use]
pub fn page_record(batch: &PageBatch) -> Option<[Bytes; 2]> {
    let length = 8 + batch.size();
    if batch.entries.is_empty() || length > RECORD_MAX {
        return None;
    }
    let mut head = BytesMut::with_capacity(16 + batch.entries.len() * 8);
    head.put_u32_le(kind::PAGE_DATA);
    head.put_u32_le(u32::try_from(length).ok()?);
    head.put_u32_le(u32::try_from(batch.entries.len()).ok()?);
    head.put_u32_le(0);
    for entry in &batch.entries {
        head.put_u64_le(*entry);
    }
    Some([head.freeze(), batch.data.clone()])
}

/// The static part of an HVM or PVH guest's stream, as libxenguest writes it for Xen of this version: image header, domain header,
/// the CPUID leaves and MSRs (each left out when empty) and STATIC_DATA_END.
#[must_use]
pub fn hvm_preamble(major: u32, minor: u32, cpuid: &[u8], msrs: &[u8]) -> Bytes {
    let mut buffer = BytesMut::with_capacity(128 + cpuid.len() + msrs.len());
    buffer.put_u64(MARKER);
    buffer.put_u32(IMAGE_ID);
    buffer.put_u32(VERSION);
    buffer.put_u16(0);
    buffer.put_bytes(0, 6);
    buffer.put_u32_le(DOMAIN_HVM);
    buffer.put_u16_le(12);
    buffer.put_u16_le(0);
    buffer.put_u32_le(major);
    buffer.put_u32_le(minor);
    for (kind, body) in [(kind::X86_CPUID_POLICY, cpuid), (kind::X86_MSR_POLICY, msrs)] {
        if !body.is_empty() {
            put_record(&mut buffer, kind, body);
        }
    }
    put_record(&mut buffer, kind::STATIC_DATA_END, &[]);
    buffer.freeze()
}

/// Appends a record of either layer: both have the same head and padding. The body must be shorter than 4 GiB.
pub(crate) fn put_record(buffer: &mut BytesMut, kind: u32, body: &[u8]) {
    buffer.reserve(RECORD_HEADER + body.len() + 8);
    buffer.put_u32_le(kind);
    buffer.put_u32_le(u32::try_from(body.len()).unwrap_or(u32::MAX));
    buffer.put_slice(body);
    buffer.put_bytes(0, padding(body.len()));
}
