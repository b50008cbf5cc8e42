use proptest::prelude::*;

use super::*;
use crate::{
    ids::{DomId, Epoch},
    link::frame::{
        EpochEnd, ErrorCode, GuestState, GuestType, Heartbeat, Hello, LostReason, MAX_PAGES_PER_FRAME, OnPrimaryLoss,
        ProtectOffer, Purpose, QueryEntry, RefuseCode, Role, StatePart, StopReason, VersionRange, Welcome,
    },
    link::token::{RecordKey, Token},
    stream::{Layer, PAGE_SIZE, PageBatch, digest::EpochDigest},
};

fn key() -> SessionKey {
    SessionKey { generation: Generation(7), nonce: Nonce(Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff)) }
}

fn record_key() -> RecordKey {
    RecordKey { generation: Generation(5), nonce: Nonce(Uuid::from_u128(0xcafe)) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn encode(frames: &[Frame]) -> BytesMut {
    let mut encoder = Encoder::new(key());
    let mut out = BytesMut::new();
    for frame in frames {
        encoder.encode(frame, &mut out).unwrap();
    }
    out
}

fn decode_all(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(frames)
}

fn decode(bytes: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut decoder = Decoder::new(key());
    decoder.push(bytes);
    let frames = decode_all(&mut decoder)?;
    decoder.finish().map(|()| frames)
}

fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE_SIZE]
}

fn offer() -> ProtectOffer {
    ProtectOffer {
        protection: Uuid::from_u128(1),
        domain: "web".into(),
        max_memory_kib: 262_144,
        vcpus: 2,
        guest_type: GuestType::Hvm,
        on_primary_loss: OnPrimaryLoss::Activate,
        detection_ms: 1000,
        host_id: Uuid::from_u128(0xa),
        witness: Some("https://w:2379".into()),
        then: Some("{}".into()),
        no_monitor: true,
    }
}

/// One frame of each type with every field set to something that can be told apart.
fn samples() -> Vec<Frame> {
    let hello = |purpose| {
        Frame::Hello(Hello {
            versions: VersionRange { min: 1, max: 3 },
            capabilities: 5,
            software: "remusd 0.1".into(),
            host: "a".into(),
            purpose,
        })
    };
    vec![
        hello(Purpose::Protect(offer())),
        hello(Purpose::Query { protection: Some(Uuid::from_u128(2)) }),
        Frame::Welcome(Welcome {
            version: 1,
            capabilities: 0,
            software: "r".into(),
            host: "b".into(),
            wall_clock_ms: 9,
            host_id: Uuid::from_u128(0xb),
            knows_record: true,
        }),
        Frame::Refuse { code: RefuseCode::Memory, text: "free 1 MiB".into() },
        Frame::QueryResult(vec![QueryEntry {
            protection: Uuid::from_u128(3),
            role: Role::Armed,
            generation: Generation(4),
            acked: Some(Epoch(17)),
            domid: Some(DomId(12)),
        }]),
        Frame::Challenge { nonce: Nonce(Uuid::from_u128(0xc4a1)) },
        Frame::ChallengeAnswer { nonce: Nonce(Uuid::from_u128(0xc4a2)) },
        Frame::Config(Bytes::from_static(b"{}")),
        Frame::Preamble(Bytes::from_static(b"\xff\xff")),
        Frame::EpochBegin { epoch: Epoch(1), armed: true },
        Frame::State(StatePart {
            epoch: Epoch(1),
            layer: Layer::Libxl,
            kind: 3,
            total: 8,
            offset: 4,
            data: Bytes::from_static(b"qemu"),
        }),
        Frame::EpochEnd(EpochEnd {
            epoch: Epoch(1),
            armed: true,
            digest: EpochDigest(0xd16e),
            pages: 3,
            bytes: 8200,
            records: 1,
        }),
        Frame::Ack { epoch: Epoch(1), backlog_epochs: 1, backlog_bytes: 2 },
        Frame::Heartbeat(Heartbeat {
            heard_ms: 77,
            epoch: Epoch(2),
            guest: GuestState::Suspended,
            since_resume_ms: 40,
            wall_clock_ms: 1_700_000_000_000,
            late: true,
        }),
        Frame::Stop { reason: StopReason::Reboot },
        Frame::Stopped,
        Frame::BackupLost { reason: LostReason::Digest, text: "x".into() },
        Frame::Superseded { text: "y".into() },
        Frame::Handover { epoch: Epoch(9), token: Token::Primary },
        Frame::HandoverFailed { text: "v".into() },
        Frame::Token { seq: 1, token: Token::Witness(record_key()) },
        Frame::Token { seq: 2, token: Token::Primary },
        Frame::TokenAck { seq: 2 },
        Frame::Audit(crate::audit::Sample { epoch: Epoch(9), pages: vec![(0x1234, 1 << 100 | 5), (7, 8)] }),
        Frame::CodedPages { epoch: Epoch(9), body: Bytes::from_static(b"ab") },
        Frame::Error { code: ErrorCode::Unexpected, text: "z".into() },
    ]
}

#[test]
fn golden_bytes() {
    let golden = include_str!("golden.txt");
    let mut lines = String::new();
    for frame in samples() {
        let bytes = encode(std::slice::from_ref(&frame));
        lines += &format!("{} {}\n", frame.name(), hex(&bytes));
    }
    assert_eq!(lines, golden, "the wire format changed: raise VERSION_MAX and keep the old layout");
}

#[test]
fn golden_pages() {
    let frame = Frame::Pages {
        epoch: Epoch(5),
        batch: PageBatch {
            entries: vec![0x1234, 0xf000_0000_0000_0001, 0x10],
            data: [page(0xab), page(0)].concat().into(),
        },
    };
    let bytes = encode(std::slice::from_ref(&frame));
    assert_eq!(
        hex(&bytes[HEADER..HEADER + 39]),
        "0500000000000000\
         03000000\
         3412000000000000\
         01000000000000f0\
         1000000000000000\
         020001"
    );
    assert_eq!(bytes.len(), HEADER + 39 + PAGE_SIZE, "the zero page is not sent");
    assert_eq!(decode(&bytes).unwrap(), [frame]);
}

#[test]
fn every_type_survives_the_wire() {
    let frames = samples();
    assert_eq!(decode(&encode(&frames)).unwrap(), frames);
    for kind in FrameType::ALL {
        assert!(
            kind == FrameType::Pages || frames.iter().any(|f| f.frame_type() == kind),
            "{} has no sample",
            kind.name()
        );
    }
}

#[test]
fn a_frame_of_another_session_sequence_or_version_ends_it() {
    let good = encode(&[Frame::Stopped, Frame::Stopped]);
    let (first, second) = (&good[..HEADER], &good[HEADER..]);

    assert!(matches!(decode(second), Err(FrameError::Sequence { found: 1, expected: 0 })));
    let replay = [first, first].concat();
    assert!(matches!(decode(&replay), Err(FrameError::Sequence { found: 0, expected: 1 })));

    let other = SessionKey { nonce: Nonce(Uuid::nil()), ..key() };
    let mut decoder = Decoder::new(other);
    decoder.push(first);
    assert!(matches!(decoder.next_frame(), Err(FrameError::OtherSession { .. })));
    decoder.push(first);
    assert!(decoder.next_frame().is_err(), "a failed decoder stays failed");

    let mut decoder = Decoder::new(key());
    decoder.set_version(VERSION_HANDSHAKE + 1);
    decoder.push(first);
    assert!(matches!(decoder.next_frame(), Err(FrameError::Version { found: 2, expected: 3 })));

    let mut decoder = Decoder::accepting();
    decoder.push(first);
    assert_eq!(decoder.next_frame(), Err(FrameError::NotHello("STOPPED")));

    assert_eq!(decode(b"Last login: yesterday"), Err(FrameError::Magic { found: *b"Last" }));
    assert!(matches!(decode(b"x"), Err(FrameError::Magic { .. })));
}

/// A header with a valid checksum around any content.
fn header(kind: u16, length: u32) -> Vec<u8> {
    let mut raw = encode(&[Frame::Stopped]).to_vec();
    raw[6..8].copy_from_slice(&kind.to_le_bytes());
    raw[12..16].copy_from_slice(&length.to_le_bytes());
    seal(&mut raw);
    raw
}

fn seal(raw: &mut [u8]) {
    let payload = crc32fast::hash(&raw[HEADER..]);
    raw[48..52].copy_from_slice(&payload.to_le_bytes());
    let crc = crc32fast::hash(&raw[..HEADER - 4]);
    raw[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn an_oversized_frame_is_refused_from_its_header_without_reserving_for_it() {
    for kind in FrameType::ALL {
        let mut decoder = Decoder::new(key());
        decoder.push(&header(kind as u16, u32::MAX));
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong { .. })), "{}", kind.name());
        assert!(decoder.buffer().capacity() <= 2 * READ_AHEAD);
    }
    assert_eq!(decode(&header(0x38, 0)), Err(FrameError::UnknownType(0x38)));
}

#[test]
fn malformed_payloads_are_refused() {
    let mut raw = header(FrameType::Pages as u16, 12);
    raw.extend_from_slice(&[0; 8]);
    raw.extend_from_slice(&(MAX_PAGES_PER_FRAME as u32 + 1).to_le_bytes());
    seal(&mut raw);
    assert!(matches!(decode(&raw), Err(FrameError::Malformed { .. })), "too many pages");

    let pages = |entry: u64, encoding: u8| {
        let mut raw = header(FrameType::Pages as u16, 21);
        raw.extend_from_slice(&[0; 8]);
        raw.extend_from_slice(&1u32.to_le_bytes());
        raw.extend_from_slice(&entry.to_le_bytes());
        raw.push(encoding);
        seal(&mut raw);
        decode(&raw)
    };
    assert!(pages(1, 1).is_ok());
    assert!(pages(1, 2).is_err(), "raw without contents");
    assert!(pages(1, 0).is_err(), "contents missing");
    assert!(pages(1, 9).is_err(), "reserved encoding");
    assert!(pages(0xf << 60, 0).is_ok());
    assert!(pages(0xf << 60, 1).is_err(), "contents where the type has none");

    let mut raw = encode(&[Frame::Stop { reason: StopReason::Crash }]).to_vec();
    raw[HEADER] = 99;
    seal(&mut raw);
    assert!(matches!(decode(&raw), Err(FrameError::Malformed { .. })), "unknown code");
}

#[test]
fn a_sender_cannot_break_the_limits() {
    let mut encoder = Encoder::new(key());
    let mut out = BytesMut::from(&b"before"[..]);
    let huge = Frame::Config(vec![0; FrameType::Config.limit() + 1].into());
    assert!(matches!(encoder.encode(&huge, &mut out), Err(FrameError::TooLong { .. })));
    assert_eq!(&out[..], b"before");
    let text = "ü".repeat(5000);
    encoder.encode(&Frame::Superseded { text }, &mut out).unwrap();
    let Frame::Superseded { text } = &decode(&out[6..]).unwrap()[0] else { panic!("another frame") };
    assert_eq!(text.len(), 4096, "a long text is cut at a character");
}

fn any_batch() -> impl Strategy<Value = PageBatch> {
    prop::collection::vec((any::<u64>(), any::<bool>(), any::<u8>()), 0..20).prop_map(|pages| {
        let mut data = Vec::new();
        let mut entries = Vec::new();
        for (entry, zero, fill) in pages {
            entries.push(entry);
            if PageBatch::has_data(entry) {
                data.extend(page(if zero { 0 } else { fill }));
            }
        }
        PageBatch { entries, data: data.into() }
    })
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let fixed = samples();
    prop_oneof![
        3 => (any::<u64>(), any_batch()).prop_map(|(epoch, batch)| Frame::Pages { epoch: Epoch(epoch), batch }),
        1 => prop::collection::vec(any::<u8>(), 0..5000).prop_map(|b| Frame::Preamble(b.into())),
        1 => ".{0,300}".prop_map(|text| Frame::Error { code: ErrorCode::Internal, text }),
        3 => prop::sample::select(fixed),
        1 => (any::<u64>(), any::<u128>(), any::<u64>(), any::<bool>()).prop_map(|(n, d, p, armed)| Frame::EpochEnd(EpochEnd {
            epoch: Epoch(n), armed, digest: EpochDigest(d), pages: p, bytes: p / 3, records: n as u32,
        })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn round_trip_in_any_chunking(
        frames in prop::collection::vec(any_frame(), 1..8),
        cuts in prop::collection::vec(1usize..9000, 1..40),
    ) {
        let bytes = encode(&frames);
        let mut decoder = Decoder::new(key());
        let mut decoded = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(*cut));
            decoder.push(now);
            rest = later;
            decoded.extend(decode_all(&mut decoder).unwrap());
        }
        prop_assert_eq!(decoded, frames);
        prop_assert!(decoder.finish().is_ok());
    }

    #[test]
    fn one_flipped_bit_is_never_a_frame(frame in any_frame(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = encode(&[frame]);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn a_truncated_stream_is_told(frame in any_frame(), at in any::<prop::sample::Index>()) {
        let bytes = encode(&[frame]);
        let at = at.index(bytes.len());
        match decode(&bytes[..at]) {
            Ok(frames) => prop_assert!(at == 0 && frames.is_empty()),
            Err(error) => prop_assert_eq!(error, FrameError::Truncated),
        }
    }

    #[test]
    fn noise_behind_a_valid_header_does_not_panic(kind in prop::sample::select(FrameType::ALL.to_vec()), noise in prop::collection::vec(any::<u8>(), 0..250)) {
        let mut raw = header(kind as u16, noise.len() as u32);
        raw.extend_from_slice(&noise);
        seal(&mut raw);
        if let Ok(frames) = decode(&raw) {
            // Whatever was accepted must mean the same when said again.
            prop_assert_eq!(decode(&encode(&frames)).unwrap(), frames);
        }
    }
}
