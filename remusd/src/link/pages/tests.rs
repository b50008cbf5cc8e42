use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::stream::PageBatch;

const HOLE: u64 = 0xf << 60;

/// What a page becomes in an epoch.
#[derive(Clone, Copy, Debug)]
enum Write {
    Zero,
    Words(u8, u8),
    Noise(u64),
    Text(u8),
    Same,
}

fn write(page: &mut [u8], write: Write) {
    let mut state = 1u64;
    let mut noise = |seed: u64| {
        state = (state ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        state
    };
    match write {
        Write::Zero => page.fill(0),
        Write::Same => {}
        Write::Words(at, count) => {
            for word in 0..usize::from(count) {
                let at = (usize::from(at) * 2 + word) % 512 * 8;
                page[at..at + 8].copy_from_slice(&noise(u64::from(count)).to_le_bytes());
            }
        }
        Write::Noise(seed) => {
            page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&noise(seed).to_le_bytes()));
        }
        Write::Text(byte) => page.iter_mut().enumerate().for_each(|(at, to)| *to = byte ^ (at / 40) as u8),
    }
}

fn writes() -> impl Strategy<Value = Write> {
    prop_oneof![
        Just(Write::Zero),
        (any::<u8>(), any::<u8>()).prop_map(|(at, count)| Write::Words(at, count)),
        any::<u64>().prop_map(Write::Noise),
        any::<u8>().prop_map(Write::Text),
        Just(Write::Same),
    ]
}

#[derive(Clone, Debug)]
struct Epoch {
    batches: Vec<Vec<(u64, Write)>>,
    dense: bool,
    /// The sender gives it up after so many parts reached the receiver.
    abandoned_after: Option<usize>,
}

fn epochs() -> impl Strategy<Value = Vec<Epoch>> {
    let batch = proptest::collection::vec((0..40u64, writes()), 1..30);
    let epoch = (proptest::collection::vec(batch, 0..4), any::<bool>(), proptest::option::weighted(0.3, 0..4usize))
        .prop_map(|(batches, dense, abandoned_after)| Epoch { batches, dense, abandoned_after });
    proptest::collection::vec(epoch, 1..12)
}

/// The pages of a batch with their new contents; `memory` is the guest's.
fn batch(memory: &mut [u8], pages: &[(u64, Write)]) -> PageBatch {
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (gfn, what) in pages {
        if gfn % 13 == 12 {
            entries.push(HOLE | gfn);
            continue;
        }
        let page = &mut memory[*gfn as usize * PAGE_SIZE..][..PAGE_SIZE];
        write(page, *what);
        entries.push(*gfn);
        data.extend_from_slice(page);
    }
    PageBatch { entries, data: Bytes::from(data) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn both_sides_stay_alike(epochs in epochs(), cache_pages in prop_oneof![Just(0usize), Just(16), Just(32), Just(4096)]) {
        let mut memory = vec![0; 40 * PAGE_SIZE];
        let (mut encoder, mut decoder) = (PageEncoder::new(cache_pages * PAGE_SIZE), PageDecoder::new(cache_pages * PAGE_SIZE));
        for epoch in &epochs {
            let effort = if epoch.dense { Effort::Dense } else { Effort::Fast };
            let before = memory.clone();
            let known = decoder.cache().fingerprint();
            encoder.begin();
            decoder.begin();
            let mut arrived = 0;
            for pages in &epoch.batches {
                let sent = batch(&mut memory, pages);
                let mut entries = Vec::new();
                let mut data = Vec::new();
                let mut lost = false;
                for part in encoder.encode(&sent, effort) {
                    if epoch.abandoned_after.is_some_and(|after| arrived >= after) {
                        lost = true;
                        continue;
                    }
                    arrived += 1;
                    let got = decoder.decode(part).unwrap();
                    entries.extend(got.entries);
                    data.extend_from_slice(&got.data);
                }
                if !lost {
                    prop_assert_eq!(&entries, &sent.entries);
                    prop_assert_eq!(&data[..], &sent.data[..]);
                }
            }
            if epoch.abandoned_after.is_some() {
                encoder.begin();
                decoder.begin();
                prop_assert_eq!(decoder.cache().fingerprint(), known, "an epoch that was given up leaves nothing");
                memory = before;
            } else {
                encoder.commit();
                decoder.commit();
            }
            prop_assert_eq!(encoder.cache().fingerprint(), decoder.cache().fingerprint());
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600), count in 0..40u8) {
        let mut decoder = PageDecoder::new(1 << 20);
        decoder.begin();
        let _ = decoder.decode(Bytes::from(bytes.clone()));
        decoder.begin();
        // With a head that lets it get further.
        let mut body = vec![0, 0, 0, 0, count, 0, 0, 0];
        for gfn in 0..count {
            body.extend_from_slice(&u64::from(gfn).to_le_bytes());
        }
        body.extend(bytes.iter().map(|byte| byte % 8));
        body.extend_from_slice(&bytes);
        let _ = decoder.decode(Bytes::from(body));
    }

    #[test]
    fn a_damaged_part_never_yields_a_page_of_another_size(at in 0..10_000usize, to in any::<u8>()) {
        let mut memory = vec![0; 40 * PAGE_SIZE];
        let (mut encoder, mut decoder) = (PageEncoder::new(1 << 20), PageDecoder::new(1 << 20));
        encoder.begin();
        decoder.begin();
        let pages = [(1, Write::Text(3)), (2, Write::Words(9, 9)), (3, Write::Zero), (4, Write::Text(7))];
        let mut part = encoder.encode(&batch(&mut memory, &pages), Effort::Dense)[0].to_vec();
        let at = at % part.len();
        part[at] = to;
        if let Ok(got) = decoder.decode(Bytes::from(part)) {
            prop_assert_eq!(got.data.len(), got.data_pages() * PAGE_SIZE);
        }
    }
}

fn encoded(encoder: &mut PageEncoder, memory: &mut [u8], pages: &[(u64, Write)]) -> (usize, Counts) {
    let before = encoder.counts();
    encoder.begin();
    let bytes = encoder.encode(&batch(memory, pages), Effort::Dense).iter().map(Bytes::len).sum();
    encoder.commit();
    let now = encoder.counts();
    let counts = Counts {
        zero: now.zero - before.zero,
        unchanged: now.unchanged - before.unchanged,
        sparse: now.sparse - before.sparse,
        xor: now.xor - before.xor,
        lz4: now.lz4 - before.lz4,
        raw: now.raw - before.raw,
    };
    (bytes, counts)
}

#[test]
fn each_page_gets_the_cheapest_encoding() {
    let mut memory = vec![0; 40 * PAGE_SIZE];
    let mut encoder = PageEncoder::new(1 << 20);
    let all = |what| (0..10).map(|gfn| (gfn, what)).collect::<Vec<_>>();
    let one = |counts: Counts| [counts.zero, counts.unchanged, counts.sparse, counts.xor, counts.lz4, counts.raw];
    assert_eq!(one(encoded(&mut encoder, &mut memory, &all(Write::Zero)).1), [10, 0, 0, 0, 0, 0]);
    assert_eq!(one(encoded(&mut encoder, &mut memory, &all(Write::Text(5))).1), [0, 0, 0, 0, 10, 0]);
    assert_eq!(one(encoded(&mut encoder, &mut memory, &all(Write::Same)).1), [0, 10, 0, 0, 0, 0]);
    let (bytes, counts) = encoded(&mut encoder, &mut memory, &all(Write::Words(7, 2)));
    assert_eq!(one(counts), [0, 0, 10, 0, 0, 0]);
    assert!(bytes * 100 < 10 * PAGE_SIZE, "{bytes}");
    assert_eq!(one(encoded(&mut encoder, &mut memory, &all(Write::Words(0, 200))).1), [0, 0, 0, 10, 0, 0]);
    let (bytes, counts) = encoded(&mut encoder, &mut memory, &all(Write::Noise(3)));
    assert_eq!(one(counts), [0, 0, 0, 0, 0, 10]);
    assert!(bytes * 100 < 102 * 10 * PAGE_SIZE, "{bytes}");
}

#[test]
fn many_cores_and_one_say_the_same() {
    let mut memory = vec![0; 1000 * PAGE_SIZE];
    let pages: Vec<_> = (0..1000)
        .map(|gfn| (gfn, [Write::Words(3, 3), Write::Text(gfn as u8), Write::Zero][gfn as usize % 3]))
        .collect();
    let whole = batch(&mut memory, &pages);
    let mut together = PageEncoder::new(16 << 20);
    together.begin();
    let parts = together.encode(&whole, Effort::Dense);
    let mut alone = PageEncoder::new(16 << 20);
    alone.begin();
    let mut number = 0;
    let (mut entries, mut data) = (whole.entries.as_slice(), whole.data.clone());
    while !entries.is_empty() {
        let (now, later) = entries.split_at(entries.len().min(50));
        let now = PageBatch { entries: now.to_vec(), data: Bytes::new() };
        let now = PageBatch { data: data.split_to(now.data_pages() * PAGE_SIZE), ..now };
        number += alone.encode(&now, Effort::Dense).len();
        entries = later;
    }
    assert!(number > parts.len());
    together.commit();
    alone.commit();
    assert_eq!(together.cache().fingerprint(), alone.cache().fingerprint());
}

#[test]
fn parts_out_of_order_and_outside_of_epochs_are_refused() {
    let mut memory = vec![0; 1000 * PAGE_SIZE];
    let pages: Vec<_> = (0..200).map(|gfn| (gfn, Write::Noise(gfn))).collect();
    let mut encoder = PageEncoder::new(1 << 20);
    let mut decoder = PageDecoder::new(1 << 20);
    encoder.begin();
    let parts = encoder.encode(&batch(&mut memory, &pages), Effort::Fast);
    assert!(parts.len() > 2);
    assert!(decoder.decode(parts[0].clone()).is_err());
    decoder.begin();
    assert!(decoder.decode(parts[1].clone()).is_err());
    decoder.decode(parts[0].clone()).unwrap();
    assert!(decoder.decode(parts[0].clone()).is_err());
    decoder.decode(parts[1].clone()).unwrap();
}

#[test]
fn golden_part() {
    let mut memory = vec![0; 40 * PAGE_SIZE];
    let (mut encoder, mut decoder) = (PageEncoder::new(1 << 20), PageDecoder::new(1 << 20));
    encoder.begin();
    decoder.begin();
    let pages = [(1, Write::Noise(1)), (2, Write::Zero), (3, Write::Noise(3))];
    for part in encoder.encode(&batch(&mut memory, &pages), Effort::Fast) {
        decoder.decode(part).unwrap();
    }
    encoder.commit();
    decoder.commit();
    encoder.begin();
    decoder.begin();
    // Unchanged, zero, a changed word and two more, a page without contents.
    memory[3 * PAGE_SIZE + 16..3 * PAGE_SIZE + 24].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    memory[3 * PAGE_SIZE + 4080..4 * PAGE_SIZE].fill(9);
    let sent = batch(&mut memory, &[(1, Write::Same), (2, Write::Zero), (3, Write::Same), (12, Write::Same)]);
    let parts = encoder.encode(&sent, Effort::Fast);
    assert_eq!(parts.len(), 1);
    let hex: String = parts[0].iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = concat!(
        "00000000",         // the epoch's first part
        "04000000",         // four pages
        "0100000000000000", // their entries
        "0200000000000000",
        "0300000000000000",
        "0c000000000000f0",
        "03010400", // unchanged, zero, sparse, none
        "1c00",     // the sparse page: 28 bytes
        "0200",     // one word from word 2 on
        "8877665544332211",
        "fe03", // two words from word 510 on
        "09090909090909090909090909090909",
    );
    assert_eq!(hex, expected, "the wire format changed: give it a new capability and keep the old layout");
    let got = decoder.decode(parts[0].clone()).unwrap();
    assert_eq!((got.entries, &got.data[..]), (sent.entries, &sent.data[..]));
}
