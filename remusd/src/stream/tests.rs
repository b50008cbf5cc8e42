//! Streams made by our writers and read by our parsers, whole, cut, and damaged. What real Xen wrote is in `fixture_tests`.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::error::StreamError;
use super::item::{CaptureItem, Layer, PAGE_SIZE, PageBatch, Record};
use super::libxc::{self, LibxcEvent, LibxcParser, page_record, parse_pages};
use super::pull::{Chunked, Pull};
use super::session::{SessionEvent, SessionParser};
use super::{PlainComposer, RemusComposer, handshake, libxl, save_file};

const CONFIG: &str = r#"{"c_info":{"type":"pvh","name":"g","domid":7},"b_info":{"max_memkb":131072}}"#;

/// The smallest preamble: headers and STATIC_DATA_END.
fn preamble() -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.extend_from_slice(&[0xff; 8]);
    bytes.extend_from_slice(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    bytes.extend_from_slice(b"\x02\0\0\0\x0c\0\0\0\x04\0\0\0\x11\0\0\0");
    libxc::put_record(&mut bytes, libxc::kind::X86_CPUID_POLICY, &[7; 24]);
    libxc::put_record(&mut bytes, libxc::kind::STATIC_DATA_END, &[]);
    bytes.freeze()
}

fn pages(count: u64, fill: u8) -> PageBatch {
    let entries: Vec<u64> = (0..count).map(|pfn| if pfn % 3 == 2 { pfn | 0xf << 60 } else { pfn }).collect();
    let with_data = entries.iter().filter(|entry| PageBatch::has_data(**entry)).count();
    PageBatch { entries, data: vec![fill; with_data * PAGE_SIZE].into() }
}

fn state(kind: u32, body: &'static [u8]) -> Record {
    Record { layer: Layer::Libxc, kind, body: Bytes::from_static(body) }
}

fn epoch_state() -> Vec<Record> {
    vec![
        libxl::emulator_context(b"QEVM state"),
        state(libxc::kind::X86_TSC_INFO, b"tsc"),
        state(libxc::kind::HVM_CONTEXT, b"context"),
        libxl::emulator_xenstore(&[("physmap/1/name".into(), "vga".into())]).unwrap(),
        state(libxc::kind::HVM_PARAMS, b"12345678"),
    ]
}

fn remus_stream() -> Bytes {
    let mut bytes = BytesMut::new();
    let mut put = |pieces: Vec<Bytes>| pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
    put(RemusComposer::head(CONFIG, &preamble()).unwrap());
    for epoch in 0..3 {
        put(RemusComposer::pages(&pages(4, epoch)).unwrap());
        put(vec![RemusComposer::end_of_epoch(&epoch_state())]);
    }
    bytes.freeze()
}

fn plain_stream() -> Bytes {
    let mut bytes = BytesMut::new();
    let mut put = |pieces: Vec<Bytes>| pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
    put(PlainComposer::head(CONFIG, &preamble()).unwrap());
    put(PlainComposer::pages(&pages(2, 1)).unwrap());
    put(PlainComposer::pages(&pages(5, 2)).unwrap());
    put(vec![PlainComposer::tail(&epoch_state())]);
    bytes.freeze()
}

/// What libxenguest alone writes in a Remus save.
fn inner_stream() -> Bytes {
    let mut bytes = BytesMut::from(&preamble()[..]);
    for fill in 0..2 {
        for piece in page_record(&pages(3, fill)).unwrap() {
            bytes.extend_from_slice(&piece);
        }
        libxc::put_record(&mut bytes, libxc::kind::HVM_CONTEXT, b"context");
        libxc::put_record(&mut bytes, libxc::kind::CHECKPOINT, &[]);
    }
    bytes.freeze()
}

/// Feeds in pieces of the given lengths, over and over.
fn feed<P: Pull>(parser: P, stream: &Bytes, cuts: &[usize]) -> Result<Vec<P::Out>, StreamError> {
    let mut chunked = Chunked::new(parser);
    let mut out = Vec::new();
    let mut rest = stream.clone();
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let length = cuts.next().copied().unwrap_or(usize::MAX).clamp(1, rest.len());
        chunked.feed(rest.split_to(length), &mut out)?;
    }
    chunked.finish()?;
    Ok(out)
}

/// libxl's records come in the order in which libxl writes them.
fn sorted_state() -> Vec<SessionEvent> {
    let state = epoch_state();
    [1, 2, 4, 3, 0].iter().map(|index| SessionEvent::Item(CaptureItem::State(state[*index].clone()))).collect()
}

fn config_event() -> SessionEvent {
    SessionEvent::Config(save_file::config_for_receiver(CONFIG).unwrap())
}

#[test]
fn a_remus_stream_round_trips() {
    let events = feed(SessionParser::new(), &remus_stream(), &[usize::MAX]).unwrap();
    let mut expected = vec![config_event(), SessionEvent::Item(CaptureItem::Preamble(preamble()))];
    for epoch in 0..3 {
        expected.push(SessionEvent::Item(CaptureItem::Pages(pages(4, epoch))));
        expected.extend(sorted_state());
        expected.push(SessionEvent::Item(CaptureItem::EndOfEpoch));
    }
    assert_eq!(events, expected);
}

#[test]
fn a_plain_stream_round_trips() {
    let events = feed(SessionParser::new(), &plain_stream(), &[usize::MAX]).unwrap();
    let mut expected = vec![
        config_event(),
        SessionEvent::Item(CaptureItem::Preamble(preamble())),
        SessionEvent::Item(CaptureItem::Pages(pages(2, 1))),
        SessionEvent::Item(CaptureItem::Pages(pages(5, 2))),
    ];
    expected.extend(sorted_state());
    expected.push(SessionEvent::End);
    assert_eq!(events, expected);
}

#[test]
fn every_cut_is_noticed() {
    let stream = inner_stream();
    // Where the stream may end: after each of the two CHECKPOINT records.
    let tail = stream.len() - preamble().len();
    let ends = [preamble().len() + tail / 2, stream.len()];
    for cut in 0..=stream.len() {
        let outcome = feed(LibxcParser::new(), &stream.slice(..cut), &[4099]);
        assert_eq!(outcome.is_ok(), ends.contains(&cut), "cut at {cut} of {}", stream.len());
    }
}

#[test]
fn bytes_after_the_end_are_refused() {
    let mut stream = BytesMut::from(&plain_stream()[..]);
    stream.extend_from_slice(b"more");
    let outcome = feed(SessionParser::new(), &stream.freeze(), &[usize::MAX]);
    assert_eq!(outcome, Err(StreamError::Trailing(4)));
}

#[test]
fn hostile_records_are_refused() {
    let after = |kind: u32, length: u32, body: &[u8]| {
        let mut stream = BytesMut::from(&preamble()[..]);
        stream.extend_from_slice(&kind.to_le_bytes());
        stream.extend_from_slice(&length.to_le_bytes());
        stream.extend_from_slice(body);
        feed(LibxcParser::new(), &stream.freeze(), &[usize::MAX]).unwrap_err()
    };
    assert!(matches!(after(libxc::kind::HVM_CONTEXT, u32::MAX, b""), StreamError::TooLong { .. }));
    assert!(matches!(after(0x77, 0, b""), StreamError::Unknown { kind: 0x77, .. }));
    assert!(matches!(after(libxc::kind::STATIC_DATA_END, 0, b""), StreamError::Misplaced { .. }));
    assert!(matches!(after(libxc::kind::CHECKPOINT, 8, &[0; 8]), StreamError::Malformed { .. }));
    let pages = |count: u32, entry: u64| {
        let mut body = count.to_le_bytes().to_vec();
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&entry.to_le_bytes());
        parse_pages(&body.into())
    };
    assert!(pages(1, 0xf << 60).is_ok());
    for (count, entry) in [(0, 0), (1, 0), (u32::MAX, 0xf << 60), (1, 5 << 60), (1, 0xf << 60 | 1 << 52)] {
        assert!(matches!(pages(count, entry), Err(StreamError::Malformed { .. })), "{count} {entry:#x}");
    }
}

#[test]
fn an_optional_record_is_skipped() {
    let mut stream = BytesMut::from(&preamble()[..]);
    libxc::put_record(&mut stream, libxc::kind::OPTIONAL | 0x99, b"whatever");
    libxc::put_record(&mut stream, libxc::kind::CHECKPOINT, &[]);
    let events = feed(LibxcParser::new(), &stream.freeze(), &[usize::MAX]).unwrap();
    assert_eq!(events.len(), 2);
    assert_eq!(events[1], LibxcEvent::Item(CaptureItem::EndOfEpoch));
}

#[test]
fn a_wrong_length_reserves_nothing() {
    let mut stream = BytesMut::from(&preamble()[..]);
    stream.extend_from_slice(&libxc::kind::HVM_CONTEXT.to_le_bytes());
    stream.extend_from_slice(&(libxc::RECORD_MAX as u32).to_le_bytes());
    stream.extend_from_slice(b"little");
    let mut chunked = Chunked::new(LibxcParser::new());
    let mut out = Vec::new();
    chunked.feed(stream.freeze(), &mut out).unwrap();
    assert!(chunked.held_capacity() < 4096);
}

#[test]
fn the_receivers_configuration_asks_for_no_domid() {
    let config = save_file::config_for_receiver(CONFIG).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["c_info"]["domid"], 0);
    assert_eq!(config["c_info"]["name"], "g");
    for bad in ["", "[]", "{}", "{\"c_info\":3}", "nonsense"] {
        assert!(save_file::config_for_receiver(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_handshake_has_xls_lengths() {
    assert_eq!(handshake::BANNER.len(), 54);
    for text in [handshake::READY, handshake::GO, handshake::REPORT] {
        assert_eq!(text.last(), Some(&0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_do_not_matter(cuts in proptest::collection::vec(1usize..9000, 1..12)) {
        let remus = remus_stream();
        prop_assert_eq!(
            feed(SessionParser::new(), &remus, &cuts).unwrap(),
            feed(SessionParser::new(), &remus, &[usize::MAX]).unwrap()
        );
        let inner = inner_stream();
        prop_assert_eq!(
            feed(LibxcParser::new(), &inner, &cuts).unwrap(),
            feed(LibxcParser::new(), &inner, &[usize::MAX]).unwrap()
        );
    }

    #[test]
    fn pages_round_trip(
        entries in proptest::collection::vec((0u64..1 << 40, prop_oneof![0u64..5, 9u64..16]), 1..40),
        fill in any::<u8>(),
    ) {
        let entries: Vec<u64> = entries.into_iter().map(|(pfn, kind)| pfn | kind << 60).collect();
        let with_data = entries.iter().filter(|entry| PageBatch::has_data(**entry)).count();
        let batch = PageBatch { entries, data: vec![fill; with_data * PAGE_SIZE].into() };
        let [head, data] = page_record(&batch).unwrap();
        let mut body = BytesMut::from(&head[8..]);
        body.extend_from_slice(&data);
        prop_assert_eq!(u32::from_le_bytes(head[4..8].try_into().unwrap()) as usize, body.len());
        prop_assert_eq!(parse_pages(&body.freeze()).unwrap(), batch);
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..4000), cut in 1usize..500) {
        let garbage = Bytes::from(bytes);
        let _ = feed(SessionParser::new(), &garbage, &[cut]);
        let _ = feed(LibxcParser::new(), &garbage, &[cut]);
        let _ = parse_pages(&garbage);
    }

    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), with in any::<u8>(), cut in 1usize..9000) {
        for stream in [remus_stream(), plain_stream(), inner_stream()] {
            let mut damaged = stream.to_vec();
            *at.get_mut(&mut damaged) = with;
            let damaged = Bytes::from(damaged);
            let _ = feed(SessionParser::new(), &damaged, &[cut]);
            let _ = feed(LibxcParser::new(), &damaged, &[cut]);
        }
    }
}
