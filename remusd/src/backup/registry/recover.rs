//! What an earlier run of the daemon left: its copies, and claims that the witness has to be told about.

use std::sync::Arc;

use devices::Copies;
use devices::mirror::Standby;
use devices::script::{ScriptLimits, ScriptStandby};

use super::{Decline, Registry};
use crate::backup::copy::{Whose, destroy_domain};
use crate::backup::drill;
use crate::backup::driver::witness::{activate, forfeit};
use crate::backup::error::BackupError;
use crate::backup::incoming::domain_ref;
use crate::backup::record::{IncomingRecord, Phase};
use crate::link::Token;
use crate::ops::EventKind;
use crate::protect::ownership::FOR_EVER;
use crate::witness::{Answer, Outcome};

impl Registry {
    /// Clears away what an earlier run of the daemon left: its receivers have ended with its pipes, and what they left is destroyed
    /// here. A copy that had been told to go is looked at: if it runs it is kept. Waits for slow destroys.
    ///
    /// # Errors
    /// [`BackupError`] if the host cannot be asked or a record not be saved.
    pub async fn recover(self: &Arc<Self>) -> Result<(), BackupError> {
        let records: Vec<_> = self.known().records.values().cloned().collect();
        for mut record in records {
            drill::clear_away(self.host.as_ref(), record.uuid, &record.name).await;
            if matches!(record.phase, Phase::Active | Phase::Discarded) {
                if record.owed {
                    self.settle_claim(&record);
                }
                continue;
            }
            let whose = Whose { uuid: record.uuid, name: record.name.clone() };
            let domains = self.host.domains().await?;
            let activated = domains.iter().find(|domain| whose.is_activated(domain));
            let (kind, detail) = if let Some(domain) = activated {
                record.phase = Phase::Active;
                (EventKind::Recovered, format!("the copy had been activated and runs as domain {}", domain.domid))
            } else {
                destroy_domain(self.host.as_ref(), &whose).await;
                let disks = Copies {
                    mirrored: Standby::new(&self.settings.disk_sockets, record.disks.clone()),
                    scripted: ScriptStandby::new(record.scripted.clone(), ScriptLimits::default()),
                };
                for error in disks.release().await {
                    tracing::error!(domain = record.name, "giving its disks free: {error}");
                }
                record.phase = Phase::Discarded;
                let detail = "remusd had ended while it received this copy; what was left of it is destroyed";
                (EventKind::Recovered, detail.to_owned())
            };
            self.records.save(&record)?;
            if let Some(gate) = &self.settings.gate {
                let released = match activated {
                    Some(domain) => {
                        self.host.open_vifs(domain.domid).await?;
                        gate.release(record.uuid)
                    }
                    None => gate.release_copy(record.uuid),
                };
                released.map_err(|error| BackupError::Host(error.to_string()))?;
            }
            self.events.publish(domain_ref(record.uuid, &record.name, None), kind, detail);
            self.known().records.insert(record.uuid, record.clone());
            if record.owed {
                self.settle_claim(&record);
            }
        }
        Ok(())
    }

    /// A claim of an earlier run of the daemon, whose copy runs or is gone: the witness is told which, however long that takes.
    fn settle_claim(self: &Arc<Self>, record: &IncomingRecord) {
        let (Some(offer), Token::Witness(key)) = (&record.offer, record.token) else { return };
        let (runs, uuid) = (record.phase == Phase::Active, record.uuid);
        let opened = match self.open_witness(offer, "") {
            Ok(Some((opened, _))) => opened,
            Ok(None) => return,
            Err(Decline::Lost(_)) => return,
            Err(Decline::Refuse(_, text) | Decline::Superseded(text)) => {
                tracing::error!(domain = record.name, "telling the witness what became of a claim: {text}");
                return;
            }
        };
        let registry = Arc::clone(self);
        tokio::spawn(async move {
            let told = match runs {
                true => {
                    activate(&opened.keeper, key).await;
                    true
                }
                // The claim may never have arrived, or be about to: settled first, since only a won one can be given up.
                false => match opened.keeper.claim(key, FOR_EVER).await {
                    Answer::Settled(Outcome::Won(record)) => forfeit(&opened.keeper, record.key()).await,
                    Answer::Settled(_) => true,
                    Answer::Unknown(_) => false,
                },
            };
            let record = registry.known().records.get(&uuid).cloned();
            if let Some(mut record) = record.filter(|record| told && record.token == Token::Witness(key)) {
                record.owed = false;
                registry.remember(&record);
            }
        });
    }
}
