//! Whether it pays to copy pages ahead.

/// Epochs with fewer pages than this are copied so fast that nothing is gained.
const WORTH: usize = 512;
/// After it did not pay, so many epochs pass before it is tried again.
const PATIENCE: u32 = 16;

/// Watches how many of the pages that were copied ahead were still the same at the suspend.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    last: usize,
    pause: u32,
}

impl Ahead {
    /// Whether to copy ahead in the epoch that begins.
    pub(super) fn tries(&mut self) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        self.last >= WORTH
    }

    /// An epoch had so many pages; of `copied` ones copied ahead, `kept` could be used.
    pub(super) fn saw(&mut self, pages: usize, copied: usize, kept: usize) {
        self.last = pages;
        // Reading the log makes the guest fault once more on each page that it goes on writing to.
        if copied > 0 && kept * 2 < copied {
            self.pause = PATIENCE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_tried_on_large_epochs_and_given_up_for_a_while_on_restless_pages() {
        let mut ahead = Ahead::default();
        assert!(!ahead.tries());
        ahead.saw(5000, 0, 0);
        assert!(ahead.tries());
        ahead.saw(5000, 2000, 1500);
        assert!(ahead.tries());
        ahead.saw(5000, 2000, 500);
        assert_eq!((0..20).position(|_| ahead.tries()), Some(16));
        ahead.saw(100, 0, 0);
        assert!(!ahead.tries());
    }
}
