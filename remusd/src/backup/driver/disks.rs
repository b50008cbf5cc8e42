//! The disks of one copy, mirrored or kept by programs: they hold an epoch before its memory counts as whole, and are exactly the activated epoch's before
//! the copy is built (R5).
//!
//! The machine knows nothing of them. An armed epoch's end is kept from it until every disk has all of that epoch's writes: so what
//! it acknowledges or activates, the disks have too. If the primary dies before, the epoch is not whole, and the one before counts.

use bytes::Bytes;
use devices::Copies;
use devices::mirror::Standby;
use devices::mirror::standby::name_of;
use devices::script::{ScriptLimits, ScriptStandby};

use super::{Driver, Input};
use crate::backup::machine::Event;
use crate::ids::Epoch;
use crate::link::EpochEnd;
use crate::protect::scripts;
use crate::stream::{PlainComposer, Record};

/// The mirrored disks of a domain, from libxl's JSON; CD-ROMs and disks by other backends are not ours.
fn names(links: &std::path::Path, config: &serde_json::Value) -> Vec<String> {
    let disks = config["disks"].as_array().cloned().unwrap_or_default();
    let path = |disk: &serde_json::Value| disk["pdev_path"].as_str().and_then(|path| name_of(links, path));
    disks.iter().filter_map(path).collect()
}

impl Driver {
    /// Finds the disks of the configuration that has arrived and makes them follow. Returns what of it is libxl's.
    pub(super) async fn take_disks(&mut self, config: &Bytes) -> Result<Bytes, String> {
        let (config, scripted) = scripts::take(config)?;
        let json: serde_json::Value = serde_json::from_slice(&config).map_err(|error| error.to_string())?;
        let mirrored = names(&self.settings.disk_links, &json);
        let disks = Copies {
            mirrored: Standby::new(&self.settings.disk_sockets, mirrored.clone()),
            scripted: ScriptStandby::new(scripted.clone(), ScriptLimits::default()),
        };
        if disks.is_empty() {
            return Ok(config);
        }
        // A disk that is refused is somebody's, and not to be given free when this copy is destroyed: only those that follow are ours.
        if let Err(error) = disks.accept().await {
            disks.scripted.release().await;
            return Err(error.to_string());
        }
        self.disks = disks;
        // They hold nothing yet: a daemon that dies before this leaves nothing that would have to be given free.
        (self.record.disks, self.record.scripted) = (mirrored, scripted);
        self.records.save(&self.record).map_err(|error| error.to_string())?;
        Ok(config)
    }

    /// Whether the end of this epoch has to wait for the disks; it comes again as [`Input::DisksHold`].
    pub(super) fn waits_for_disks(&self, end: &EpochEnd) -> bool {
        if !end.armed || self.disks.is_empty() {
            return false;
        }
        let (disks, tell, end) = (self.disks.clone(), self.tell.clone(), *end);
        tokio::spawn(async move {
            tokio::select! {
                () = disks.hold(end.epoch.0) => drop(tell.send(Input::DisksHold(end))),
                // The protection is over.
                () = tell.closed() => {}
            }
        });
        true
    }

    /// Makes the disks those of the epoch that is being activated, then lets the receiver build the copy.
    pub(super) fn finish_copy(&mut self, epoch: Epoch, state: &[Record]) {
        let tail = PlainComposer::tail(state);
        if self.disks.is_empty() {
            return self.feed(vec![tail]);
        }
        let (disks, tell, unwanted) = (self.disks.clone(), self.tell.clone(), self.unwanted.clone());
        tokio::spawn(async move {
            let ready = disks.activate(epoch.0).await;
            // Who destroyed the copy meanwhile found disks that were no source yet, and they would stay open for nobody (R9).
            if unwanted.is_cancelled() {
                for error in disks.release().await {
                    tracing::error!("giving the disks of a copy free that is gone: {error}");
                }
            }
            let _ = tell.send(Input::DisksReady(ready.map(|()| tail).map_err(|error| error.to_string())));
        });
    }

    /// As the machine sees it, disks that cannot be used are a copy that cannot be built.
    pub(super) fn disks_ready(&mut self, ready: Result<Bytes, String>) {
        match ready {
            Ok(tail) => self.feed(vec![tail]),
            Err(text) => self.step(Event::ReceiverDied(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirrored_disks_are_found_in_a_configuration() {
        let config = serde_json::json!({ "disks": [
            { "pdev_path": "/dev/remus/root", "vdev": "xvda" },
            { "pdev_path": "/dev/vg/data", "vdev": "xvdb" },
            { "vdev": "hdc", "is_cdrom": 1 },
        ]});
        assert_eq!(names("/dev/remus".as_ref(), &config), ["root"]);
        assert_eq!(names("/dev/remus".as_ref(), &serde_json::json!({})), Vec::<String>::new());
    }
}
