//! The mutation check: without any one of the lines that enforce the rules, a bounded number of seeds must show a violation.

use super::oracle::Rule;

/// A line that enforces a rule, by its name in [`crate::enforced`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// Its name, which begins with its rule.
    pub line: &'static str,
    /// What it does.
    pub about: &'static str,
    /// By which rules its absence may be noticed first.
    pub caught_by: &'static [Rule],
}

use Rule::{R1, R2, R3, R4, R5, R6, R7, R8, R9};

/// All of them.
pub const MUTANTS: &[Mutant] = &[
    Mutant {
        line: "R1-armed-means-held",
        about: "an epoch is called armed only if its output was held from its suspend on",
        caught_by: &[R1, R4],
    },
    Mutant {
        line: "R1-given-away-stands-still",
        about: "a guest that is handed over does not live on after its last epoch",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R2-pages-wait-for-the-whole",
        about: "pages of an epoch are fed only once all of it is there",
        caught_by: &[R2],
    },
    Mutant {
        line: "R2-claiming-freezes-acks",
        about: "nothing is acknowledged once an activation has begun",
        caught_by: &[R2],
    },
    Mutant {
        line: "R3-claim-before-going-on",
        about: "a primary that loses its backup claims the record before it goes on alone",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R3-claim-before-go",
        about: "a backup claims the record before its copy is started",
        caught_by: &[R1, R3],
    },
    Mutant { line: "R3-loser-yields", about: "a primary that lost the record is frozen", caught_by: &[R1, R3] },
    Mutant { line: "R3-unknown-is-not-won", about: "an unknown claim is not won", caught_by: &[R1, R3] },
    Mutant {
        line: "R3-loser-releases-nothing",
        about: "a superseded primary drops what it holds",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R3-token-needs-its-answer",
        about: "the primary's token counts only once the backup has given its claim up",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R3-given-is-given",
        about: "a guest handed over without a witness is not taken back without the backup's word",
        caught_by: &[R1, R3, R9],
    },
    Mutant { line: "R4-armed-first", about: "nothing before the first armed epoch is activated", caught_by: &[R1, R4] },
    Mutant {
        line: "R1-disk-held-before-acknowledging",
        about: "an epoch is acknowledged only once its disk's writes are there",
        caught_by: &[R1],
    },
    Mutant {
        line: "R3-loser-closes-its-disk",
        about: "who lost the guest closes its disk and lets it be overwritten",
        caught_by: &[R6],
    },
    Mutant {
        line: "R5-barrier-after-suspend",
        about: "a disk's epoch is closed only when the guest stands still",
        caught_by: &[R5],
    },
    Mutant {
        line: "R5-cut-at-the-epoch",
        about: "what the copy's disk holds of later epochs is dropped on activation",
        caught_by: &[R5],
    },
    Mutant {
        line: "R5-commit-with-the-memory",
        about: "a copy's disk takes an epoch in only once its memory is whole, too",
        caught_by: &[R5],
    },
    Mutant {
        line: "R5-armed-copy-stays",
        about: "a copy that holds a guest's epochs is not replaced by a new session",
        caught_by: &[R1, R5],
    },
    Mutant {
        line: "R5-durable-marks",
        about: "a mark stays until the copy has the write on stable storage",
        caught_by: &[R5],
    },
    Mutant { line: "R5-mark-before-write", about: "a region's mark is on disk before it is written", caught_by: &[R5] },
    Mutant {
        line: "R5-flush-before-a-mark-goes",
        about: "a source has flushed a write before it forgets that it made it",
        caught_by: &[R5],
    },
    Mutant { line: "R5-union-of-marks", about: "what either side has marked is synchronised", caught_by: &[R5] },
    Mutant {
        line: "R6-primary-goes-on",
        about: "without a witness a primary that loses its backup goes on alone",
        caught_by: &[R6],
    },
    Mutant {
        line: "R6-winner-that-fails-forfeits",
        about: "a backup that won and cannot start gives the record back",
        caught_by: &[R6],
    },
    Mutant { line: "R7-digest", about: "an epoch that arrived damaged is not whole", caught_by: &[R7] },
    Mutant {
        line: "R8-backlog",
        about: "nothing is acknowledged that the receiver is far behind of",
        caught_by: &[R8],
    },
    Mutant {
        line: "R9-an-ended-link-activates-nothing",
        about: "the end of a link leaves the copy waiting",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R9-newer-session-lives",
        about: "a copy goes for a newer session only if its primary answers a challenge in time",
        caught_by: &[R9],
    },
    Mutant {
        line: "R9-owner-before-unsealing",
        about: "a restarted daemon finds out who owns the guest before it unseals it",
        caught_by: &[R1, R3],
    },
    Mutant {
        line: "R9-refused-disk-is-left-alone",
        about: "a disk that may not be overwritten is not given free when the copy is destroyed that wanted it",
        caught_by: &[R9],
    },
    Mutant {
        line: "R9-overtaken-activation-is-taken-back",
        about: "a disk whose copy was given up while it was being activated is opened for nobody",
        caught_by: &[R6],
    },
    Mutant {
        line: "R9-nothing-here-owns-nothing",
        about: "a host that came back without the guest leaves the other host's copy alone",
        caught_by: &[R9],
    },
];

/// How a mutant fared.
#[derive(Clone, Debug)]
pub struct Fate {
    /// Which.
    pub mutant: Mutant,
    /// The seed that showed it, how many seeds that took, and the violation.
    pub caught: Option<(u64, u64, super::Violation)>,
}

impl Fate {
    /// Whether it was caught, and by a rule that it breaks.
    #[must_use]
    pub fn good(&self) -> bool {
        self.caught.as_ref().is_some_and(|(_, _, violation)| self.mutant.caught_by.contains(&violation.rule))
    }
}

/// Runs each mutant on up to `seeds` seeds from `start` on. `told` hears of each as it is done.
#[cfg(feature = "mutants")]
pub fn check(start: u64, seeds: u64, jobs: usize, told: &dyn Fn(&Fate)) -> Vec<Fate> {
    let fate = |mutant: &Mutant| {
        let order = super::campaign::Order { start, seeds, jobs, coverage: false, without: Some(mutant.line) };
        let summary = super::campaign::campaign(order, &|_| {});
        let caught = summary.violation.map(|(seed, violation)| (seed, summary.runs, violation));
        let fate = Fate { mutant: *mutant, caught };
        told(&fate);
        fate
    };
    MUTANTS.iter().map(fate).collect()
}
