//! Mapped stretches of guest memory, and copying from them with all cores.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use rayon::prelude::*;

use crate::stream::PAGE_SIZE;

/// Pages of one window: 4 MiB, what libxenguest maps at once.
pub const WINDOW: usize = 1024;
/// Pages that one core copies at a time.
const STRETCH: usize = 64;
/// Fewer pages are copied on the caller's core: waking others takes as long.
const PARALLEL: usize = 4 * STRETCH;

/// What keeps a window's memory mapped; unmaps when dropped.
pub trait Mapping: Send + Sync {
    /// Where it is: readable for [`WINDOW`] pages, apart from those that the window says are not mapped, for as long as this lives.
    fn start(&self) -> NonNull<u8>;
}

struct Window {
    mapping: Box<dyn Mapping>,
    /// A bit for each page that is mapped.
    mapped: [u64; WINDOW / 64],
}

/// A guest's memory, by page number.
#[derive(Default)]
pub struct Windows {
    windows: Vec<Option<Window>>,
    pages: u64,
}

impl Windows {
    /// Nothing mapped.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the window that begins at page `index * WINDOW`; replaces an earlier one. `mapped` has a bit for each page.
    pub fn set(&mut self, index: usize, mapping: Box<dyn Mapping>, mapped: [u64; WINDOW / 64]) {
        self.remove(index);
        if self.windows.len() <= index {
            self.windows.resize_with(index + 1, || None);
        }
        self.pages += count(&mapped);
        self.windows[index] = Some(Window { mapping, mapped });
    }

    /// Unmaps a window.
    pub fn remove(&mut self, index: usize) {
        if let Some(window) = self.windows.get_mut(index).and_then(Option::take) {
            self.pages -= count(&window.mapped);
        }
    }

    /// Unmaps everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Pages mapped.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// A bit for each mapped page of a window.
    #[must_use]
    pub fn mapped(&self, index: usize) -> [u64; WINDOW / 64] {
        self.windows.get(index).and_then(Option::as_ref).map_or([0; WINDOW / 64], |window| window.mapped)
    }

    /// The first window with something mapped at or after `index`, else the first of all.
    #[must_use]
    pub fn next(&self, index: usize) -> Option<usize> {
        let mapped = |index: &usize| self.windows.get(*index).is_some_and(Option::is_some);
        (index..self.windows.len()).find(mapped).or_else(|| (0..self.windows.len()).find(mapped))
    }

    /// How many windows have something mapped.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.windows.iter().flatten().count()
    }

    fn page(&self, gfn: u64) -> Option<*const u8> {
        let gfn = usize::try_from(gfn).ok()?;
        let window = self.windows.get(gfn / WINDOW)?.as_ref()?;
        let page = gfn % WINDOW;
        if window.mapped[page / 64] & 1 << (page % 64) == 0 {
            return None;
        }
        // SAFETY: a window has WINDOW pages.
        Some(unsafe { window.mapping.start().as_ptr().add(page * PAGE_SIZE) })
    }

    /// Whether a page is mapped.
    #[must_use]
    pub fn has(&self, gfn: u64) -> bool {
        self.page(gfn).is_some()
    }

    /// All mapped pages, in order, into `out`.
    pub fn list(&self, out: &mut Vec<u64>) {
        out.clear();
        for (index, window) in self.windows.iter().enumerate() {
            if let Some(window) = window {
                bits(&window.mapped, (index * WINDOW) as u64, out);
            }
        }
    }

    /// Copies the pages to `out`, one after the other, with all cores if there are many. Pages that are not mapped are left as they
    /// are in `out`. A page that its guest writes to meanwhile is copied in some state of that.
    ///
    /// # Panics
    /// If `out` is shorter than the pages.
    pub fn gather(&self, gfns: &[u64], out: &mut [u8]) {
        let out = &mut out[..gfns.len() * PAGE_SIZE];
        if gfns.len() < PARALLEL || rayon::current_num_threads() == 1 {
            return self.gather_here(gfns, out);
        }
        gfns.par_chunks(STRETCH)
            .zip(out.par_chunks_mut(STRETCH * PAGE_SIZE))
            .for_each(|(gfns, out)| self.gather_here(gfns, out));
    }

    fn gather_here(&self, gfns: &[u64], out: &mut [u8]) {
        for (gfn, out) in gfns.iter().zip(out.chunks_exact_mut(PAGE_SIZE)) {
            if let Some(page) = self.page(*gfn) {
                // SAFETY: the page is mapped, and `out` is a page of our own. The guest may write to the page meanwhile, as a device
                // would: then the bytes are any mix of old and new, and its log has the page for the next copy. No reference to it is
                // ever made.
                unsafe { std::ptr::copy_nonoverlapping(page, out.as_mut_ptr(), PAGE_SIZE) };
            }
        }
    }
}

fn count(mapped: &[u64]) -> u64 {
    mapped.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Appends the numbers of the set bits, `first` being that of bit 0.
pub fn bits(words: &[u64], first: u64, out: &mut Vec<u64>) {
    for (index, word) in words.iter().enumerate() {
        let mut word = *word;
        while word != 0 {
            out.push(first + index as u64 * 64 + u64::from(word.trailing_zeros()));
            word &= word - 1;
        }
    }
}

/// Memory of this process as a window: for tests and measurements.
pub struct OwnMemory {
    memory: NonNull<u8>,
}

// SAFETY: the memory belongs to this value alone and is only read through it after it was made.
unsafe impl Send for OwnMemory {}
// SAFETY: as above.
unsafe impl Sync for OwnMemory {}

impl OwnMemory {
    const LAYOUT: std::alloc::Layout = match std::alloc::Layout::from_size_align(WINDOW * PAGE_SIZE, PAGE_SIZE) {
        Ok(layout) => layout,
        Err(_) => panic!("a window's layout"),
    };

    /// A window's pages, filled by `fill`.
    #[must_use]
    pub fn new(fill: impl FnOnce(&mut [u8])) -> Self {
        // SAFETY: the layout has a size.
        let memory = unsafe { std::alloc::alloc_zeroed(Self::LAYOUT) };
        let Some(memory) = NonNull::new(memory) else { std::alloc::handle_alloc_error(Self::LAYOUT) };
        // SAFETY: just made, of this size, ours alone.
        fill(unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), WINDOW * PAGE_SIZE) });
        Self { memory }
    }
}

impl Mapping for OwnMemory {
    fn start(&self) -> NonNull<u8> {
        self.memory
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), Self::LAYOUT) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> Windows {
        let mut windows = Windows::new();
        for index in [0, 2] {
            let memory = OwnMemory::new(|memory| {
                for (page, bytes) in memory.chunks_exact_mut(PAGE_SIZE).enumerate() {
                    bytes.fill((index * 7 + page) as u8);
                }
            });
            let mut mapped = [u64::MAX; WINDOW / 64];
            mapped[1] = 1;
            windows.set(index, Box::new(memory), mapped);
        }
        windows
    }

    #[test]
    fn pages_are_found_where_they_are_mapped() {
        let mut windows = windows();
        assert_eq!(windows.pages(), 2 * (1024 - 63));
        assert!(windows.has(0) && windows.has(64) && !windows.has(65) && !windows.has(1024) && windows.has(2048));
        assert!(!windows.has(u64::MAX) && !windows.has(9999));
        let mut list = Vec::new();
        windows.list(&mut list);
        assert_eq!((list.len() as u64, list[64], list[65]), (windows.pages(), 64, 128));
        assert_eq!(
            (windows.in_use(), windows.next(0), windows.next(1), windows.next(3)),
            (2, Some(0), Some(2), Some(0))
        );
        windows.remove(0);
        assert!(!windows.has(0));
        assert_eq!((windows.in_use(), windows.next(0)), (1, Some(2)));
        assert_eq!(windows.pages(), 1024 - 63);
        windows.remove(77);
        windows.clear();
        assert_eq!((windows.pages(), windows.next(0)), (0, None));
    }

    #[test]
    fn few_and_many_pages_are_copied_alike() {
        let windows = windows();
        let mut gfns = Vec::new();
        windows.list(&mut gfns);
        gfns.reverse();
        gfns.push(5000);
        let mut many = vec![9; gfns.len() * PAGE_SIZE];
        windows.gather(&gfns, &mut many);
        for (gfn, page) in gfns.iter().zip(many.chunks_exact(PAGE_SIZE)) {
            let expected = if *gfn == 5000 { 9 } else { ((gfn / 1024 * 7) + gfn % 1024) as u8 };
            assert!(page.iter().all(|byte| *byte == expected), "{gfn}");
        }
        let mut few = vec![0; 3 * PAGE_SIZE];
        windows.gather(&gfns[..3], &mut few);
        assert_eq!(few, many[..3 * PAGE_SIZE]);
    }

    #[test]
    fn bits_are_listed() {
        let mut out = Vec::new();
        bits(&[1 | 1 << 63, 0, 2], 1000, &mut out);
        assert_eq!(out, [1000, 1063, 1129]);
    }
}
