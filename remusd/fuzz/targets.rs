//! What is fuzzed: plain functions that panic when something is wrong. `fuzz_targets` hands them to libFuzzer, `remusd/tests/fuzz.rs`
//! to arbitrary and mutated inputs and to the corpora, with the stable compiler.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use devices::{Node, classify};
use remusd::api::wire::{Asked, Call};
use remusd::backup::record::IncomingRecord;
use remusd::config::Config;
use remusd::daemon::monitor::MonitorRecord;
use remusd::ids::ProtectionId;
use remusd::link::codec::{Decoder, Encoder};
use remusd::link::pages::PageDecoder;
use remusd::link::{Frame, FrameError};
use remusd::pair::keyring::{Identity, PeersFile};
use remusd::pair::message::{self, KeysAnswer, KeysRequest, PairMessage};
use remusd::pair::{Fingerprint, HostId, PairingRequest, peer};
use remusd::state::PrimaryRecord;
use remusd::stream::libxc::{self, LibxcParser};
use remusd::stream::{Chunked, PAGE_SIZE, Pull, SessionParser, libxl, save_file};
use remusd::witness::record::Record;

/// Feeds one input to a parser; a panic is what fuzzing looks for.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const ALL: &[(&str, Target)] = &[
    ("frames", frames),
    ("pages", pages),
    ("streams", streams),
    ("xenstore", xenstore),
    ("api", api),
    ("state", state),
    ("witness", witness),
    ("pairing", pairing),
    ("config", config),
];

const HEADER: usize = 56;

/// Corrects the checksums of what looks like frames, so that damage gets past them.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + HEADER) {
        let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
        let payload = at + HEADER..(at + HEADER).saturating_add(length).min(bytes.len());
        let crc = crc32fast::hash(&bytes[payload.clone()]);
        bytes[at + 48..at + 52].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[at..at + 52]);
        bytes[at + 52..at + 56].copy_from_slice(&crc.to_le_bytes());
        at = payload.end;
    }
    bytes
}

fn decode(data: &[u8], piece: usize) -> (Decoder, Vec<Frame>, Option<FrameError>) {
    let mut decoder = Decoder::accepting();
    let mut frames = Vec::new();
    for piece in data.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next_frame().as_ref(), Err(&error), "a broken stream stays broken");
                    return (decoder, frames, Some(error));
                }
            }
        }
    }
    (decoder, frames, None)
}

/// Link frames. The first byte says how to cut the input, and whether its checksums are put right.
pub fn frames(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let data = if how & 1 == 1 { with_checksums(data) } else { data.to_vec() };
    let (decoder, whole, error) = decode(&data, usize::MAX);
    let (_, cut, cut_error) = decode(&data, usize::from(how / 2) + 1);
    assert_eq!(whole, cut, "cutting changes what is read");
    // Which bytes an error shows may depend on the cut: a wrong magic is told at its first byte.
    let kind = |error: &Option<FrameError>| error.as_ref().map(std::mem::discriminant);
    assert_eq!(kind(&error), kind(&cut_error), "{error:?}, {cut_error:?}");
    // One form for one meaning: what was read is written as it came.
    let Some(key) = decoder.key() else { return };
    let mut encoder = Encoder::new(key);
    let mut written = BytesMut::new();
    for frame in &whole {
        encoder.encode(frame, &mut written).expect("what was read can be written");
    }
    assert!(data.starts_with(&written), "{whole:?} is written in another form than it was read");
}

fn pull<P: Pull>(parser: P, data: &[u8], piece: usize) -> (Vec<P::Out>, Result<(), String>)
where
    P::Out: PartialEq + std::fmt::Debug,
{
    let mut chunked = Chunked::new(parser);
    let mut out = Vec::new();
    for piece in data.chunks(piece) {
        if let Err(error) = chunked.feed(Bytes::copy_from_slice(piece), &mut out) {
            return (out, Err(error.to_string()));
        }
    }
    (out, chunked.finish().map_err(|error| error.to_string()))
}

/// Parts of coded pages, each behind a u16 that says how long it is (bits 15:1) and whether an epoch ends after it (bit 0).
pub fn pages(data: &[u8]) {
    let mut decoders = [PageDecoder::new(1 << 18), PageDecoder::new(1 << 18)];
    decoders.iter_mut().for_each(PageDecoder::begin);
    let mut rest = data;
    while let Some((how, next)) = rest.split_first_chunk::<2>() {
        let how = u16::from_le_bytes(*how);
        let (part, later) = next.split_at(next.len().min(usize::from(how / 2)));
        rest = later;
        let part = Bytes::copy_from_slice(part);
        let got = decoders.each_mut().map(|decoder| decoder.decode(part.clone()));
        assert_eq!(got[0], got[1]);
        match &got[0] {
            Ok(batch) => assert_eq!(batch.data.len(), batch.data_pages() * PAGE_SIZE),
            // The session would end here; nothing of the epoch may stay.
            Err(_) => decoders.iter_mut().for_each(PageDecoder::begin),
        }
        if how & 1 == 1 {
            decoders.iter_mut().for_each(PageDecoder::commit);
            decoders.iter_mut().for_each(PageDecoder::begin);
        }
        assert_eq!(decoders[0].cache().fingerprint(), decoders[1].cache().fingerprint());
    }
}

/// xl, libxl and libxc streams.
pub fn streams(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let piece = usize::from(how) * 16 + 1;
    let (session, end) = pull(SessionParser::new(), data, usize::MAX);
    let (cut, cut_end) = pull(SessionParser::new(), data, piece);
    assert_eq!(session, cut, "cutting changes what is read");
    assert_eq!(end.is_ok(), cut_end.is_ok());
    let (inner, end) = pull(LibxcParser::new(), data, usize::MAX);
    let (cut, cut_end) = pull(LibxcParser::new(), data, piece);
    assert_eq!(inner, cut, "cutting changes what is read");
    assert_eq!(end.is_ok(), cut_end.is_ok());
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(batch) = libxc::parse_pages(&bytes) {
        let [head, body] = libxc::page_record(&batch).expect("what was read can be written");
        // Without the record's own head.
        let mut written: Vec<u8> = [&head[8..], &body[..]].concat();
        // Reserved, and not looked at.
        written[4..8].copy_from_slice(&data[4..8]);
        assert_eq!(written, data, "pages are written in another form than they were read");
    }
    let _ = libxl::check_header(&bytes);
    let _ = libxl::check_emulator(u32::from(how), &bytes);
    let _ = save_file::check_header(&bytes);
    if let Ok(config) = save_file::config(&bytes) {
        let _ = save_file::config_for_receiver(&config);
    }
}

/// What a guest, or a tool, may have written to xenstore: lines of kind, number, who wrote it, backend and values.
pub fn xenstore(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let nodes: Vec<Node> = text
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let mut word = || words.next().unwrap_or_default().to_owned();
            let (kind, devid, from_libxl, backend) = (word(), word(), word(), word());
            let values: BTreeMap<String, String> =
                words.filter_map(|word| word.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            Node {
                kind,
                devid: devid.parse().unwrap_or(0),
                from_libxl: from_libxl == "libxl",
                backend: (!backend.is_empty()).then_some(backend),
                values,
            }
        })
        .collect();
    for hvm in [false, true] {
        let found = classify(7, hvm, &nodes);
        for device in &found.devices {
            let known = nodes.iter().any(|node| node.from_libxl && node.devid == device.devid);
            assert!(known, "{device:?} stands on what only the guest wrote");
        }
        for refused in &found.refused {
            let _ = refused.to_string();
        }
    }
}

fn comes_back<T>(value: &T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = serde_json::to_vec(value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(*value, again);
}

/// Requests at the control socket.
pub fn api(data: &[u8]) {
    if let Ok(call) = Call::parse(data)
        && let Ok(Asked::Ours(request)) = call.asked()
    {
        assert_eq!(Call::of(&request).asked(), Ok(Asked::Ours(request)));
    }
}

/// Files of the state folder.
pub fn state(data: &[u8]) {
    fn file<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(data: &[u8]) {
        if let Ok(value) = serde_json::from_slice::<T>(data) {
            comes_back(&value);
        }
    }
    file::<PrimaryRecord>(data);
    file::<IncomingRecord>(data);
    file::<MonitorRecord>(data);
    file::<Identity>(data);
    file::<PeersFile>(data);
}

/// The witness record, which whoever can write to the witness may have damaged.
pub fn witness(data: &[u8]) {
    let Some((&last, data)) = data.split_first() else { return };
    let uuid = ProtectionId::from_u128(u128::from(last));
    if let Ok(record) = Record::from_json(uuid, data) {
        assert_eq!(record.uuid, uuid);
        assert_eq!(Record::from_json(uuid, record.to_json().as_bytes()).as_ref(), Ok(&record));
        let _ = record.to_string();
    }
}

/// Messages of pairing and about keys.
pub fn pairing(data: &[u8]) {
    if let Ok(message) = message::parse::<PairMessage>(data) {
        comes_back(&message);
    }
    if let Ok(request) = message::parse::<KeysRequest>(data) {
        comes_back(&request);
        if let KeysRequest::Announce(certificate) = request {
            let _ = certificate.names(HostId(ProtectionId::nil()));
        }
    }
    if let Ok(answer) = message::parse::<KeysAnswer>(data) {
        comes_back(&answer);
    }
    if let Ok(request) = message::parse::<PairingRequest>(data) {
        comes_back(&request);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(fingerprint) = text.parse::<Fingerprint>() {
            assert_eq!(fingerprint.to_string(), text);
        }
        if peer::is_host(text) {
            assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && !b" ;$`'\"\\|&<>(){}*?!#~".contains(&byte)));
        }
    }
}

/// The configuration file.
pub fn config(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(config) = Config::parse(text)
    {
        assert!(config.listen.port >= 1024);
    }
}
