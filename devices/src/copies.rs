//! The disks of one incoming protection, of whatever subkind, as the backup's daemon drives them: all together.

use futures::future::{join, try_join};

use crate::mirror::client::ClientError;
use crate::mirror::{Standby, StandbyError};
use crate::script::{ScriptStandby, ScriptStandbyError};

/// A disk cannot be what the backup needs.
#[derive(Debug, thiserror::Error)]
pub enum CopiesError {
    /// A mirrored one.
    #[error(transparent)]
    Mirror(#[from] StandbyError),
    /// One that a program keeps.
    #[error(transparent)]
    Script(#[from] ScriptStandbyError),
}

impl From<ClientError> for CopiesError {
    fn from(error: ClientError) -> Self {
        Self::Mirror(error.into())
    }
}

/// All disks of a copy.
#[derive(Debug, Clone)]
pub struct Copies {
    /// Those on the mirror.
    pub mirrored: Standby,
    /// Those that programs keep.
    pub scripted: ScriptStandby,
}

impl Copies {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mirrored.is_empty() && self.scripted.is_empty()
    }

    /// What the disks have here will be overwritten: a copy of the guest begins to arrive.
    ///
    /// # Errors
    /// The first disk that cannot.
    pub async fn accept(&self) -> Result<(), CopiesError> {
        let mirrored = async { Ok(self.mirrored.accept().await?) };
        let scripted = async { Ok(self.scripted.accept().await?) };
        try_join(mirrored, scripted).await.map(drop)
    }

    /// Returns once all of the epoch's writes are here on every disk. Never, if they do not come.
    pub async fn hold(&self, epoch: u64) {
        join(self.mirrored.hold(epoch), self.scripted.hold(epoch)).await;
    }

    /// The memory will never go back before this epoch.
    ///
    /// # Errors
    /// The first disk's.
    pub async fn commit(&self, epoch: u64) -> Result<(), CopiesError> {
        let mirrored = async { Ok(self.mirrored.commit(epoch).await?) };
        let scripted = async { Ok(self.scripted.commit(epoch).await?) };
        try_join(mirrored, scripted).await.map(drop)
    }

    /// Makes every disk exactly that of `epoch`, and usable by xl (R5). To be called with the copy of the guest stopped: ownership is
    /// proven after this and before it runs.
    ///
    /// # Errors
    /// The first disk's; then none may be used, see [`Copies::release`].
    pub async fn activate(&self, epoch: u64) -> Result<(), CopiesError> {
        let mirrored = async { Ok(self.mirrored.activate(epoch).await?) };
        let scripted = async { Ok(self.scripted.activate(epoch).await?) };
        try_join(mirrored, scripted).await.map(drop)
    }

    /// The copy of the guest is gone: the disks follow the source again, or whoever is the source then.
    ///
    /// Returns what could not be done.
    pub async fn release(&self) -> Vec<CopiesError> {
        let (mirrored, scripted) = join(self.mirrored.release(), self.scripted.release()).await;
        mirrored.into_iter().map(Into::into).chain(scripted.into_iter().map(Into::into)).collect()
    }
}
