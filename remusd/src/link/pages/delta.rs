//! Differences between two pages, by words of 8 bytes.

use crate::stream::PAGE_SIZE;

/// Words looked at together: a cache line, and few enough for the compiler to compare them as vectors.
const BLOCK: usize = 64;
const WORD: usize = 8;
/// Most words of one run: its length less one has 7 bits.
const RUN_MAX: usize = 128;
/// Bytes of a sparse difference above which other encodings are as good.
pub(super) const SPARSE_MAX: usize = 1024;

/// Whether every byte is zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(256).all(|chunk| {
        let folded = chunk.as_chunks::<WORD>().0.iter().fold(0, |folded, word| folded | u64::from_ne_bytes(*word));
        folded == 0
    })
}

/// What [`sparse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// None.
    Same,
    /// The runs are in the scratch, this many bytes.
    Runs(usize),
    /// More than [`SPARSE_MAX`] bytes of runs.
    Large,
}

/// Writes the runs of words in which `page` differs from `base` to `out`, which must have [`SPARSE_MAX`] bytes.
pub(super) fn sparse(page: &[u8], base: &[u8], out: &mut [u8]) -> Difference {
    let mut used = 0;
    // Where the open run's head is, and the word after its last one.
    let mut head = 0;
    let mut next = usize::MAX;
    for (block, (new, old)) in page.chunks_exact(BLOCK).zip(base.chunks_exact(BLOCK)).enumerate() {
        if new == old {
            continue;
        }
        let words = new.as_chunks::<WORD>().0.iter().zip(old.as_chunks::<WORD>().0);
        for (index, (new, _)) in words.enumerate().filter(|(_, (new, old))| new != old) {
            let word = block * (BLOCK / WORD) + index;
            let goes_on = word == next && word - first(out, head) < RUN_MAX;
            let need = if goes_on { WORD } else { 2 + WORD };
            if used + need > SPARSE_MAX {
                return Difference::Large;
            }
            if goes_on {
                let length = word - first(out, head);
                put(out, head, first(out, head), length);
            } else {
                head = used;
                put(out, head, word, 0);
                used += 2;
            }
            out[used..used + WORD].copy_from_slice(new);
            used += WORD;
            next = word + 1;
        }
    }
    if used == 0 { Difference::Same } else { Difference::Runs(used) }
}

fn first(out: &[u8], head: usize) -> usize {
    usize::from(u16::from_le_bytes([out[head], out[head + 1]]) & 0x1ff)
}

fn put(out: &mut [u8], head: usize, first: usize, length_less_one: usize) {
    let code = (first | length_less_one << 9) as u16;
    out[head..head + 2].copy_from_slice(&code.to_le_bytes());
}

/// Replaces the words of `page` that the runs name. Fails, with the page in any state, on runs that do not fit.
pub(super) fn apply(mut runs: &[u8], page: &mut [u8]) -> Result<(), &'static str> {
    while let Some((code, rest)) = runs.split_first_chunk::<2>() {
        let code = usize::from(u16::from_le_bytes(*code));
        let (first, length) = (code & 0x1ff, (code >> 9) + 1);
        let Some((words, rest)) = rest.split_at_checked(length * WORD) else {
            return Err("a run is cut off");
        };
        let Some(place) = page.get_mut(first * WORD..(first + length) * WORD) else {
            return Err("a run lies outside of its page");
        };
        place.copy_from_slice(words);
        runs = rest;
    }
    if runs.is_empty() { Ok(()) } else { Err("a run is cut off") }
}

/// `out` becomes `page` XOR `base`.
pub(super) fn xor(page: &[u8], base: &[u8], out: &mut [u8; PAGE_SIZE]) {
    for (out, (new, old)) in out.iter_mut().zip(page.iter().zip(base)) {
        *out = new ^ old;
    }
}

/// `page` becomes itself XOR `base`.
pub(super) fn xor_into(page: &mut [u8], base: &[u8]) {
    for (byte, old) in page.iter_mut().zip(base) {
        *byte ^= old;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_found_can_be_applied(changes in proptest::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..200), fill in any::<u8>()) {
            let base = [fill; PAGE_SIZE];
            let mut page = base;
            changes.iter().for_each(|(at, to)| page[*at] = *to);
            let mut runs = [0; SPARSE_MAX];
            match sparse(&page, &base, &mut runs) {
                Difference::Same => prop_assert_eq!(page, base),
                Difference::Runs(length) => {
                    let mut again = base;
                    apply(&runs[..length], &mut again).unwrap();
                    prop_assert_eq!(again, page);
                }
                Difference::Large => {
                    let words = page.chunks(8).zip(base.chunks(8)).filter(|(a, b)| a != b).count();
                    prop_assert!(words * 10 > SPARSE_MAX);
                }
            }
        }

        #[test]
        fn any_runs_are_applied_or_refused(runs in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = apply(&runs, &mut [0; PAGE_SIZE]);
        }
    }

    #[test]
    fn sixteen_bytes_cost_eighteen() {
        let base = [7; PAGE_SIZE];
        let mut page = base;
        page[2048..2064].copy_from_slice(&[9; 16]);
        assert_eq!(sparse(&page, &base, &mut [0; SPARSE_MAX]), Difference::Runs(18));
    }

    #[test]
    fn long_runs_are_cut() {
        let base = [0; PAGE_SIZE];
        let mut page = base;
        page[..125 * 8].fill(1);
        assert_eq!(sparse(&page, &base, &mut [0; SPARSE_MAX]), Difference::Runs(1002));
        page[..129 * 8].fill(1);
        assert_eq!(sparse(&page, &base, &mut [0; SPARSE_MAX]), Difference::Large);
    }

    #[test]
    fn one_byte_is_not_zero() {
        for at in [0, 255, 256, 4095] {
            let mut page = [0; PAGE_SIZE];
            assert!(is_zero(&page));
            page[at] = 1;
            assert!(!is_zero(&page));
        }
    }
}
