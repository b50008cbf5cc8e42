//! What has to be synchronised when two copies meet.
//!
//! Two copies of one *lineage* are alike outside the union of both sides' marks: a source marks a region before it
//! writes it and keeps the mark until the other side has it on stable storage, and a copy that becomes the source does
//! so with the marks it had. So the union covers what a primary wrote and never sent, and what a backup wrote after it
//! took over (hazard F16). A new lineage is drawn when a copy meets one of another lineage: everything is compared.

use super::extent::Geometry;
use super::meta::{Head, Role};

/// What is to be done before records flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// These regions, and those marked at the source, are synchronised.
    Union(Vec<u32>),
    /// All regions are compared, under this new lineage.
    Everything {
        /// To be saved by the source, once all of its marks are set, and then by the target.
        lineage: u128,
    },
}

/// Two copies that cannot follow each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Size, block size or region size differ.
    #[error("the disks differ: {ours:?} here, {theirs:?} there; make the backing devices equal")]
    Geometry {
        /// Here.
        ours: Geometry,
        /// There.
        theirs: Geometry,
    },
    /// The other copy is one that a guest writes, or wrote last.
    #[error("the other copy is not a target: say there `remus-disk ctl NAME demote` if it may be overwritten")]
    NotTarget,
}

/// The source's plan for a target.
///
/// `theirs` is the target's head, `marks` its marked regions, `fresh` a number never used before.
///
/// # Errors
/// [`PlanError`].
pub fn plan(ours: &Head, theirs: &Head, marks: Vec<u32>, fresh: u128) -> Result<Plan, PlanError> {
    if ours.geometry != theirs.geometry {
        return Err(PlanError::Geometry { ours: ours.geometry, theirs: theirs.geometry });
    }
    if theirs.role != Role::Target {
        return Err(PlanError::NotTarget);
    }
    // A target that died while applying differs where the batches since the last durable one wrote; the source has
    // marks for exactly those. An unfinished synchronisation likewise left its marks at the source.
    if ours.lineage != 0 && ours.lineage == theirs.lineage {
        return Ok(Plan::Union(marks));
    }
    Ok(Plan::Everything { lineage: fresh.max(1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads() -> (Head, Head) {
        let geometry = Geometry::new(1 << 20, 512, 1 << 18).unwrap();
        let mut ours = Head::fresh(geometry, 1);
        let mut theirs = Head::fresh(geometry, 2);
        (ours.role, theirs.role) = (Role::Source, Role::Target);
        (ours.lineage, theirs.lineage) = (9, 9);
        (ours, theirs)
    }

    #[test]
    fn one_lineage_needs_only_the_union() {
        let (ours, theirs) = heads();
        assert_eq!(plan(&ours, &theirs, vec![3], 77), Ok(Plan::Union(vec![3])));
    }

    #[test]
    fn without_a_common_lineage_everything_is_compared() {
        let (mut ours, mut theirs) = heads();
        theirs.lineage = 8;
        assert_eq!(plan(&ours, &theirs, vec![], 77), Ok(Plan::Everything { lineage: 77 }));
        (ours.lineage, theirs.lineage) = (0, 0);
        assert_eq!(plan(&ours, &theirs, vec![], 77), Ok(Plan::Everything { lineage: 77 }));
    }

    #[test]
    fn a_copy_that_a_guest_wrote_is_not_overwritten_unasked() {
        let (ours, mut theirs) = heads();
        theirs.role = Role::Source;
        assert_eq!(plan(&ours, &theirs, vec![], 77), Err(PlanError::NotTarget));
    }

    #[test]
    fn different_disks_are_refused() {
        let (ours, mut theirs) = heads();
        theirs.geometry.size *= 2;
        assert!(matches!(plan(&ours, &theirs, vec![], 77), Err(PlanError::Geometry { .. })));
    }
}
