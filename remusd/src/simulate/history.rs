//! What a guest has lived through, as a place in a tree: copies share their past up to where one was activated from a checkpoint.

/// A moment in a guest's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Moment {
    /// Which life.
    pub branch: u32,
    /// How many steps have been lived, those before the branch included.
    pub depth: u32,
}

/// All lives: each branch but the first begins at a moment of another.
#[derive(Clone, Debug)]
pub struct Histories {
    from: Vec<Moment>,
}

impl Default for Histories {
    fn default() -> Self {
        Self { from: vec![Moment::default()] }
    }
}

impl Histories {
    /// A copy begins to live at `at`.
    pub fn fork(&mut self, at: Moment) -> Moment {
        self.from.push(at);
        Moment { branch: (self.from.len() - 1) as u32, depth: at.depth }
    }

    /// Whether one who is at `later` has lived through `earlier`.
    #[must_use]
    pub fn contains(&self, later: Moment, earlier: Moment) -> bool {
        let mut at = later;
        loop {
            if at.branch == earlier.branch {
                return earlier.depth <= at.depth;
            }
            if at.branch == 0 {
                return false;
            }
            at = self.from[at.branch as usize];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_share_what_was_before_the_fork() {
        let mut all = Histories::default();
        let at = |branch, depth| Moment { branch, depth };
        let copy = all.fork(at(0, 5));
        assert_eq!(copy, at(1, 5));
        assert!(all.contains(at(1, 9), at(0, 5)) && all.contains(at(0, 9), at(0, 9)));
        assert!(!all.contains(at(1, 9), at(0, 6)), "lived by the other one only");
        assert!(!all.contains(at(0, 9), at(1, 6)) && !all.contains(at(0, 4), at(0, 5)));
        let third = all.fork(at(1, 7));
        assert!(all.contains(third, at(0, 5)) && all.contains(third, at(1, 7)) && !all.contains(third, at(1, 8)));
    }
}
