//! A device subkind, whole and small: CONTRIBUTING.md explains it, and this is compiled and run with the tests.
//!
//! The device is an imaginary card that posts letters. Its backend puts what the guest posts into a tray; the postman takes letters
//! from the box. The subkind keeps rule R1 for it: nothing goes from the tray into the box before the backup has acknowledged the epoch
//! that it was posted in. A real subkind does the same with packets (`netbuffer`) or writes (`mirror`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use devices::{
    Checkpointed, Device, DeviceError, DeviceSet, DeviceStats, Ending, EpochContext, Kind, Match, Policy, Subkind,
};

/// What the guest has posted and what the postman sees.
#[derive(Debug, Default)]
struct Post {
    tray: Vec<String>,
    /// Letters of the epoch that was closed and is not acknowledged yet.
    held: Vec<String>,
    delivered: Vec<String>,
    holding: bool,
}

type SharedPost = Arc<Mutex<Post>>;

fn locked(post: &SharedPost) -> MutexGuard<'_, Post> {
    post.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest posts a letter.
fn post(post: &SharedPost, letter: &str) {
    let mut post = locked(post);
    if post.holding {
        post.tray.push(letter.to_owned());
    } else {
        post.delivered.push(letter.to_owned());
    }
}

/// 1. The subkind: which devices it takes.
struct Mailbox {
    post: SharedPost,
}

#[async_trait]
impl Subkind for Mailbox {
    fn name(&self) -> &'static str {
        "mailbox"
    }

    fn kind(&self) -> Kind {
        Kind::Nic
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        // Looked at, not touched. What cannot be told is an error and not a `No`: the next subkind might take a device that is ours.
        match device.param("script") {
            Some("mailbox") => Ok(Match::Yes),
            Some(_) => Ok(Match::No),
            None => Err(DeviceError::failed(device, "look at its script", "its backend has none yet")),
        }
    }

    fn attach(&self, _: &Device) -> Box<dyn Checkpointed> {
        Box::new(Attached { post: self.post.clone() })
    }
}

/// 2. One device in its care.
struct Attached {
    post: SharedPost,
}

#[async_trait]
impl Checkpointed for Attached {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        // Output flows until the first armed epoch, so there is nothing to do yet.
        Ok(())
    }

    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        let mut post = locked(&self.post);
        let Post { tray, held, delivered, holding } = &mut *post;
        match ending {
            // The guest is ours: what it has posted goes out, in order, and it is as it was before.
            Ending::Release => {
                delivered.append(held);
                delivered.append(tray);
                *holding = false;
            }
            // It is not: nobody may ever see it, and the device stays closed.
            Ending::Discard => {
                held.clear();
                tray.clear();
            }
            Ending::Hold => {}
        }
        Ok(())
    }

    async fn arm(&mut self) -> Result<(), DeviceError> {
        locked(&self.post).holding = true;
        Ok(())
    }

    async fn postsuspend(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        // The guest stands still, so this may not wait for anything.
        let mut post = locked(&self.post);
        let Post { tray, held, .. } = &mut *post;
        held.append(tray);
        Ok(())
    }

    async fn commit(&mut self, _: &EpochContext) -> Result<(), DeviceError> {
        let mut post = locked(&self.post);
        let Post { held, delivered, .. } = &mut *post;
        delivered.append(held);
        Ok(())
    }

    // `abandon` is left as it is: the letters stay held, and go with the next epoch that is acknowledged.

    fn stats(&self) -> DeviceStats {
        let post = locked(&self.post);
        DeviceStats { queued: (post.held.len() + post.tray.len()) as u64, ..DeviceStats::default() }
    }
}

/// 3. The list: more particular subkinds before more general ones. remusd has its list in `remusd/src/daemon/devices.rs`.
fn set(post: &SharedPost) -> DeviceSet {
    DeviceSet::new(vec![Arc::new(Mailbox { post: post.clone() })], Policy::default())
}

fn card() -> Device {
    let params = [("script".to_owned(), "mailbox".to_owned())].into();
    Device { kind: Kind::Nic, domid: 3, devid: 0, names: vec!["vif3.0".into()], params }
}

/// One epoch as the primary drives it. `acknowledged`: what becomes of it.
async fn epoch(set: &mut DeviceSet, number: u64, acknowledged: bool) -> Result<(), devices::SetError> {
    let epoch = EpochContext { epoch: number, armed: true };
    if number == 1 {
        set.arm(&epoch).await?;
    }
    set.postsuspend(&epoch).await?;
    set.preresume(&epoch).await?;
    if acknowledged { set.commit(&epoch).await } else { set.abandon(&epoch).await }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), devices::SetError> {
    let letters = SharedPost::default();
    let mut set = set(&letters);
    set.setup(vec![card()]).await?;
    epoch(&mut set, 1, true).await?;
    post(&letters, "dear world");
    println!("posted, seen by nobody: {:?}", locked(&letters).delivered);
    epoch(&mut set, 2, true).await?;
    println!("acknowledged: {:?}", locked(&letters).delivered);
    set.teardown(Ending::Release).await;
    Ok(())
}

/// 4. Tests: what is seen, when, and after each ending.
#[cfg(test)]
mod tests {
    use super::*;

    fn seen(post: &SharedPost) -> Vec<String> {
        locked(post).delivered.clone()
    }

    async fn armed(letters: &SharedPost) -> DeviceSet {
        let mut set = set(letters);
        set.setup(vec![card()]).await.unwrap();
        post(letters, "before");
        assert_eq!(seen(letters), ["before"], "output flows until it is armed");
        epoch(&mut set, 1, true).await.unwrap();
        set
    }

    #[tokio::test]
    async fn nothing_is_seen_before_its_epoch_is_acknowledged() {
        let letters = SharedPost::default();
        let mut set = armed(&letters).await;
        post(&letters, "one");
        assert_eq!(seen(&letters), ["before"]);
        epoch(&mut set, 2, false).await.unwrap();
        post(&letters, "two");
        assert_eq!(seen(&letters), ["before"], "an abandoned epoch lets nothing go");
        assert_eq!(set.stats()[0].1.queued, 2);
        epoch(&mut set, 3, true).await.unwrap();
        assert_eq!(seen(&letters), ["before", "one", "two"], "in order");
        post(&letters, "three");
        assert!(set.teardown(Ending::Release).await.is_empty());
        assert!(set.teardown(Ending::Release).await.is_empty(), "twice is once");
        assert_eq!(seen(&letters).last().unwrap(), "three");
    }

    #[tokio::test]
    async fn what_the_loser_held_is_seen_by_nobody() {
        let letters = SharedPost::default();
        let mut set = armed(&letters).await;
        post(&letters, "lost");
        assert!(set.teardown(Ending::Discard).await.is_empty());
        post(&letters, "and closed");
        assert_eq!(seen(&letters), ["before"]);
    }

    #[tokio::test]
    async fn a_device_that_cannot_be_judged_is_no_reason_to_ask_the_next() {
        let letters = SharedPost::default();
        let unknown = Device { params: [].into(), ..card() };
        assert!(set(&letters).setup(vec![unknown]).await.is_err());
    }
}
