//! What the capture and the page codec cost, held against the plain copy of the same pages in the same run.
//!
//! `cargo bench -p remusd`. Needs no Xen: the guest is some memory of this process.

use bytes::Bytes;
use divan::{Bencher, counter::BytesCount};
use remusd::link::pages::{Effort, PageDecoder, PageEncoder};
use remusd::pool::BufferPool;
use remusd::stream::{PAGE_SIZE, PageBatch};
use remusd::xen::foreign::windows::{OwnMemory, WINDOW, Windows, bits};

/// A guest of 256 MiB.
const WINDOWS: usize = 64;
const PAGES: u64 = (WINDOWS * WINDOW) as u64;
const BATCH: usize = 1024;

fn main() {
    divan::main();
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Pages of words that are pointers, counters and text by turns, as a guest's are.
fn fill(page: u64, bytes: &mut [u8]) {
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let seed = page << 9 | index as u64;
        let value = match index % 3 {
            0 => 0xffff_8880_0000_0000 | (mix(seed) & 0xffff_f000),
            1 => 0,
            _ => u64::from_le_bytes(*b"a log of") ^ (seed & 0xf),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn guest() -> Windows {
    let mut windows = Windows::new();
    for index in 0..WINDOWS {
        let memory = OwnMemory::new(|memory| {
            for (page, bytes) in memory.chunks_exact_mut(PAGE_SIZE).enumerate() {
                fill((index * WINDOW + page) as u64, bytes);
            }
        });
        windows.set(index, Box::new(memory), [u64::MAX; WINDOW / 64]);
    }
    windows
}

/// So many pages of the guest, scattered: a bit each.
fn log(count: u64) -> Vec<u64> {
    let mut log = vec![0u64; (PAGES / 64) as usize];
    let mut set = 0;
    let mut seed = 1;
    while set < count {
        seed += 1;
        let gfn = mix(seed) % PAGES;
        let (word, bit) = ((gfn / 64) as usize, 1 << (gfn % 64));
        if log[word] & bit == 0 {
            log[word] |= bit;
            set += 1;
        }
    }
    log
}

const COUNTS: [u64; 3] = [500, 5000, 20_000];

/// The bound: these pages copied by one core, page by page, to memory that is there already.
#[divan::bench(args = COUNTS)]
fn a_plain_copy(bencher: Bencher, count: u64) {
    let windows = guest();
    let mut gfns = Vec::new();
    bits(&log(count), 0, &mut gfns);
    let mut to = vec![1; gfns.len() * PAGE_SIZE];
    bencher.counter(BytesCount::new(gfns.len() * PAGE_SIZE)).bench_local(|| {
        for (gfns, to) in gfns.chunks(32).zip(to.chunks_mut(32 * PAGE_SIZE)) {
            windows.gather(gfns, to);
        }
    });
}

/// What the native engine does while the guest is suspended: the log to a list, the pages to buffers of the pool, with all cores.
#[divan::bench(args = COUNTS)]
fn b_capture(bencher: Bencher, count: u64) {
    let windows = guest();
    let log = log(count);
    let pool = BufferPool::new(64);
    pool.warm(64, BATCH * PAGE_SIZE);
    let mut gfns = Vec::new();
    bencher.counter(BytesCount::new(count as usize * PAGE_SIZE)).bench_local(|| {
        gfns.clear();
        bits(&log, 0, &mut gfns);
        let mut copied = Vec::new();
        for gfns in gfns.chunks(BATCH) {
            let mut data = pool.take_full(BATCH * PAGE_SIZE);
            windows.gather(gfns, &mut data[..gfns.len() * PAGE_SIZE]);
            copied.push((gfns.to_vec(), data));
        }
        copied
    });
}

/// Two states of the same pages, so many bytes of each changed from one to the other.
fn two_states(pages: u64, changed: usize) -> [PageBatch; 2] {
    let mut data = vec![0; pages as usize * PAGE_SIZE];
    data.chunks_exact_mut(PAGE_SIZE).enumerate().for_each(|(page, bytes)| fill(page as u64, bytes));
    let batch = |data: &[u8]| PageBatch { entries: (0..pages).collect(), data: Bytes::from(data.to_vec()) };
    let before = batch(&data);
    for (page, bytes) in data.chunks_exact_mut(PAGE_SIZE).enumerate() {
        let at = page * 64 % (PAGE_SIZE - changed + 1) / 8 * 8;
        for (index, word) in bytes[at..at + changed].chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix((page << 10 | index) as u64 + 7).to_le_bytes());
        }
    }
    [before, batch(&data)]
}

fn encode(bencher: Bencher, changed: usize, effort: Effort) {
    let states = two_states(5000, changed);
    let mut encoder = PageEncoder::new(256 << 20);
    let mut turn = 0;
    let epoch = |encoder: &mut PageEncoder, turn: &mut usize| -> usize {
        *turn += 1;
        encoder.begin();
        let state = &states[*turn % 2];
        let mut bytes = 0;
        for first in (0..5000).step_by(BATCH) {
            let last = (first + BATCH).min(5000);
            let part = PageBatch {
                entries: state.entries[first..last].to_vec(),
                data: state.data.slice(first * PAGE_SIZE..last * PAGE_SIZE),
            };
            bytes += encoder.encode(&part, effort).iter().map(Bytes::len).sum::<usize>();
        }
        encoder.commit();
        bytes
    };
    epoch(&mut encoder, &mut turn);
    let bytes = epoch(&mut encoder, &mut turn);
    eprintln!(
        "{changed} bytes changed per page, {effort:?}: {bytes} bytes, {:.4} of raw",
        bytes as f64 / (5000.0 * PAGE_SIZE as f64)
    );
    bencher.counter(BytesCount::new(5000 * PAGE_SIZE)).bench_local(|| epoch(&mut encoder, &mut turn));
}

/// Encoding with all cores, caches kept.
#[divan::bench(args = [16, 512, 4096])]
fn c_encode_dense(bencher: Bencher, changed: usize) {
    encode(bencher, changed, Effort::Dense);
}

/// As above, for a link that takes what comes.
#[divan::bench(args = [16, 512, 4096])]
fn d_encode_fast(bencher: Bencher, changed: usize) {
    encode(bencher, changed, Effort::Fast);
}

/// The receiver's half, on one core.
#[divan::bench(args = [16, 512, 4096])]
fn e_decode(bencher: Bencher, changed: usize) {
    let states = two_states(2000, changed);
    let mut encoder = PageEncoder::new(256 << 20);
    let mut decoder = PageDecoder::new(256 << 20);
    let mut parts = |turn: usize| {
        encoder.begin();
        let parts = encoder.encode(&states[turn % 2], Effort::Dense);
        encoder.commit();
        parts
    };
    // The first fills both caches; the next two are the same for ever.
    let mut take = |parts: &[Bytes]| {
        decoder.begin();
        for part in parts {
            divan::black_box(decoder.decode(part.clone()).expect("just encoded"));
        }
        decoder.commit();
    };
    take(&parts(0));
    let pair = [parts(1), parts(2)];
    let mut turn = 0;
    bencher.counter(BytesCount::new(2000 * PAGE_SIZE)).bench_local(|| {
        turn += 1;
        take(&pair[(turn + 1) % 2]);
    });
}

/// Finding and writing what differs, one core: 16 bytes of each page. Without the caches' own copies.
#[divan::bench]
fn f_sparse_one_core(bencher: Bencher) {
    let states = two_states(60, 16);
    let mut encoder = PageEncoder::new(256 << 20);
    encoder.begin();
    encoder.encode(&states[0], Effort::Fast);
    encoder.commit();
    bencher.counter(BytesCount::new(60 * PAGE_SIZE)).bench_local(|| {
        encoder.begin();
        encoder.encode(&states[1], Effort::Fast)
    });
}
