//! The contents of a dirtier page.
//!
//! A page of 512 words is `page, version, words written, sum`, then payload.
//! Word `i` of version `v` is a function of (seed, page, v, i), so that every
//! word of a page can be told right from wrong without reading any other.

/// Words in a 4 KiB page.
pub(super) const WORDS: usize = 512;
/// Words of the header: page, version, words written, sum.
pub(super) const HEADER: usize = 4;

/// Spreads all bits of `x` (the finaliser of splitmix64).
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What all payload words of one version of one page derive from.
pub(super) fn key(seed: u64, page: u64, version: u64) -> u64 {
    mix(mix(seed ^ page).wrapping_add(version))
}

/// Payload word `i`. One multiplication: the dirtier must not be bound by it.
pub(super) fn word(key: u64, i: usize) -> u64 {
    key.wrapping_add(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes the header and the payload up to word `len` of one page.
pub(super) fn write(words: &mut [u64], seed: u64, page: u64, version: u64, len: usize) {
    let k = key(seed, page, version);
    let mut sum = 0u64;
    // Payload first, header last: a page torn in the middle of a write then
    // shows either way round.
    for (i, to) in words[HEADER..len].iter_mut().enumerate() {
        let w = word(k, i + HEADER);
        sum = sum.rotate_left(1).wrapping_add(w);
        *to = w;
    }
    words[..HEADER].copy_from_slice(&[page, version, len as u64, sum]);
}

/// What is wrong with a page that should be at `version` with `len` words
/// written over a full filling of version `base`; `None` when nothing is.
pub(super) fn fault(words: &[u64], seed: u64, page: u64, version: u64, len: usize, base: u64) -> Option<String> {
    let len_now = if version == base { WORDS } else { len };
    let [found_page, found_version, found_len, found_sum] = [words[0], words[1], words[2], words[3]];
    if found_page != page {
        return Some(format!("holds page {found_page}"));
    }
    if found_version != version {
        return Some("another version".into());
    }
    if found_len != len_now as u64 {
        return Some(format!("{found_len} words written instead of {len_now}"));
    }
    let (k, k_base) = (key(seed, page, version), key(seed, page, base));
    let mut sum = 0u64;
    for (i, &w) in words.iter().enumerate().skip(HEADER) {
        let right = if i < len_now {
            sum = sum.rotate_left(1).wrapping_add(w);
            word(k, i)
        } else {
            word(k_base, i)
        };
        if w != right {
            return Some(format!("word {i} is {w:#018x} instead of {right:#018x}"));
        }
    }
    (sum != found_sum).then(|| "checksum in the header differs".into())
}
