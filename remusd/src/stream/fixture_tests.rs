//! Golden bytes: streams that stock Xen 4.17.7 wrote (`xl remus` of a PVH and an HVM guest, Debian 12). Cut down to two epochs and
//! their smallest page batches; every record that is left is byte for byte as it came.

use bytes::Bytes;

use super::item::{CaptureItem, Layer, Record};
use super::libxc::{self, LibxcEvent, LibxcParser};
use super::pull::{Chunked, Pull};
use super::session::{SessionEvent, SessionParser};
use super::{RemusComposer, libxl, save_file};

const PVH: &[u8] = include_bytes!("testdata/remus-pvh.bin");
const HVM: &[u8] = include_bytes!("testdata/remus-hvm.bin");

fn parse<P: Pull>(parser: P, stream: &'static [u8]) -> Vec<P::Out> {
    let mut chunked = Chunked::new(parser);
    let mut events = Vec::new();
    chunked.feed(Bytes::from_static(stream), &mut events).unwrap();
    chunked.finish().unwrap();
    events
}

fn config(events: &[SessionEvent]) -> &str {
    match &events[0] {
        SessionEvent::Config(config) => config,
        other => panic!("{other:?} comes first"),
    }
}

/// The stream as our composer writes it, from what our parser read.
fn recomposed(events: &[SessionEvent]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut state: Vec<Record> = Vec::new();
    for event in events {
        let pieces = match event {
            SessionEvent::Config(_) | SessionEvent::End => vec![],
            SessionEvent::Item(CaptureItem::Preamble(preamble)) => {
                RemusComposer::head(config(events), preamble).unwrap()
            }
            SessionEvent::Item(CaptureItem::Pages(batch)) => RemusComposer::pages(batch).unwrap(),
            SessionEvent::Item(CaptureItem::State(record)) => {
                state.push(record.clone());
                vec![]
            }
            SessionEvent::Item(CaptureItem::EndOfEpoch) => {
                vec![RemusComposer::end_of_epoch(&std::mem::take(&mut state))]
            }
        };
        pieces.iter().for_each(|piece| out.extend_from_slice(piece));
    }
    out
}

/// What follows xl's head.
fn after_head(stream: &[u8]) -> &[u8] {
    let optional = save_file::check_header(&Bytes::copy_from_slice(&stream[..save_file::HEADER])).unwrap();
    &stream[save_file::HEADER + optional..]
}

#[test]
fn what_xl_wrote_is_what_we_write() {
    for stream in [PVH, HVM] {
        let events = parse(SessionParser::new(), stream);
        let ours = recomposed(&events);
        assert!(after_head(&ours) == after_head(stream), "the streams differ");
        // Of xl's head all but the configuration's text, which libxl formats in its own way.
        assert_eq!(ours[..44], stream[..44]);
    }
}

#[test]
fn xl_sends_no_domid() {
    for stream in [PVH, HVM] {
        let events = parse(SessionParser::new(), stream);
        let theirs: serde_json::Value = serde_json::from_str(config(&events)).unwrap();
        let ours = save_file::config_for_receiver(config(&events)).unwrap();
        let ours: serde_json::Value = serde_json::from_str(&ours).unwrap();
        let mut expected = theirs.clone();
        expected["c_info"]["domid"] = 0.into();
        assert_eq!(ours, expected, "nothing else is changed");
        let sent = theirs["c_info"].get("domid").cloned().unwrap_or_else(|| 0.into());
        assert_eq!(sent, 0);
    }
}

/// (layer, type) of each epoch's state, in order.
fn states(events: &[SessionEvent]) -> Vec<Vec<(Layer, u32)>> {
    let mut epochs = vec![vec![]];
    for event in events {
        match event {
            SessionEvent::Item(CaptureItem::State(record)) => {
                epochs.last_mut().unwrap().push((record.layer, record.kind));
            }
            SessionEvent::Item(CaptureItem::EndOfEpoch) => epochs.push(vec![]),
            _ => {}
        }
    }
    assert_eq!(epochs.pop(), Some(vec![]), "nothing after the last epoch");
    epochs
}

#[test]
fn an_epoch_of_each_guest_type_has_the_known_records() {
    let platform = [
        (Layer::Libxc, libxc::kind::X86_TSC_INFO),
        (Layer::Libxc, libxc::kind::HVM_CONTEXT),
        (Layer::Libxc, libxc::kind::HVM_PARAMS),
    ];
    let pvh = platform.to_vec();
    let hvm = [&platform[..], &[(Layer::Libxl, libxl::kind::EMULATOR_CONTEXT)]].concat();
    assert_eq!(states(&parse(SessionParser::new(), PVH)), [pvh.clone(), pvh]);
    assert_eq!(states(&parse(SessionParser::new(), HVM)), [hvm.clone(), hvm]);
}

#[test]
fn qemus_state_has_its_own_magic() {
    let events = parse(SessionParser::new(), HVM);
    let states: Vec<&Record> = events
        .iter()
        .filter_map(|event| match event {
            SessionEvent::Item(CaptureItem::State(record)) if record.layer == Layer::Libxl => Some(record),
            _ => None,
        })
        .collect();
    assert_eq!(states.len(), 2);
    for record in states {
        // QEMU_VM_FILE_MAGIC, after our record's own head: upstream QEMU, index 0.
        assert_eq!(&record.body[..12], b"\x02\0\0\0\0\0\0\0QEVM");
        assert_eq!(libxl::emulator_context(&record.body[8..]), *record);
    }
}

/// The inner stream alone is what the save helper writes: it has the epochs' ends, and no libxl records.
#[test]
fn the_helpers_stream_is_the_inner_one() {
    let events = parse(SessionParser::new(), PVH);
    let items: Vec<CaptureItem> = events
        .iter()
        .filter_map(|event| match event {
            SessionEvent::Item(item) => Some(item.clone()),
            _ => None,
        })
        .collect();
    // A PVH guest's checkpoint has one libxl record, CHECKPOINT_END: 8 bytes after each CHECKPOINT.
    let outer = after_head(PVH);
    let mut inner = outer[libxl::HEADER + 8..].to_vec();
    let end = b"\x0e\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0";
    while let Some(at) = inner.windows(16).position(|window| window == end) {
        inner.drain(at + 8..at + 16);
    }
    let mut chunked = Chunked::new(LibxcParser::new());
    let mut inner_events = Vec::new();
    chunked.feed(Bytes::from(inner), &mut inner_events).unwrap();
    chunked.finish().unwrap();
    let inner_items: Vec<CaptureItem> = inner_events
        .into_iter()
        .filter_map(|event| match event {
            LibxcEvent::Item(item) => Some(item),
            LibxcEvent::End => None,
        })
        .collect();
    assert_eq!(inner_items, items);
}
